"""The allow-list of architectures: Hugging Face module names <-> GGUF tensor names.

Each entry is a table; anything that it does not name is refused, never guessed. Mistral is
llama.cpp's `llama`. Not covered: experts (MoE), biases, norms, multimodal towers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"

_SEPARATE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PHI3 = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    """How one architecture's modules are called by transformers (and mlx-lm) and in a GGUF.

    Attributes:
        blocks: module inside a block -> GGUF tensor inside a block.
        trunk: what transformers puts before the blocks, e.g. `model.`.
        layers: the name of the list of blocks.
        embedding: the module of the input embedding, inside the trunk.
        permutes: GGUF interleaves the rows of Q and K (llama.cpp's conversion/llama.py, permute).
        conv1d: the base's linear modules are GPT-2's Conv1D, for PEFT's fan_in_fan_out.
    """

    blocks: Mapping[str, str] = field(default_factory=lambda: _SEPARATE)
    trunk: str = "model."
    layers: str = "layers"
    embedding: str = "embed_tokens"
    permutes: bool = False
    conv1d: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(permutes=True),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma": Architecture(),
    "phi3": Architecture(blocks=_PHI3),
    "gpt2": Architecture(
        blocks=_GPT2, trunk="transformer.", layers="h", embedding="wte", conv1d=True
    ),
}


def tensor_of(module: str, architecture: Architecture) -> str | None:
    """The GGUF tensor of a Hugging Face module (None: unknown).

    >>> tensor_of("model.layers.3.self_attn.q_proj", ARCHITECTURES["llama"])
    'blk.3.attn_q.weight'
    """
    # mlx-lm calls every trunk "model."; AutoModel saves without one.
    inside = module.removeprefix(architecture.trunk).removeprefix("model.")
    if module == "lm_head":
        return OUTPUT
    if inside == architecture.embedding:
        return EMBEDDING
    match = re.fullmatch(rf"{architecture.layers}\.(0|[1-9]\d{{0,5}})\.(.+)", inside)
    part = architecture.blocks.get(match[2]) if match else None
    return f"blk.{match[1]}.{part}.weight" if match and part else None


def module_of(tensor: str, architecture: Architecture) -> str | None:
    """The inverse of tensor_of, as transformers names the module."""
    if tensor == OUTPUT:
        return "lm_head"
    if tensor == EMBEDDING:
        return architecture.trunk + architecture.embedding
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor)
    parts = {part: inside for inside, part in architecture.blocks.items()}
    if not match or match[2] not in parts:
        return None
    return f"{architecture.trunk}{architecture.layers}.{match[1]}.{parts[match[2]]}"


def n_permuted_heads(
    tensor: str, architecture: Architecture, n_head: int, n_head_kv: int
) -> int | None:
    """How many heads' rows are interleaved in this GGUF tensor (None: rows keep their order)."""
    if architecture.permutes and tensor.endswith(".attn_q.weight"):
        return n_head
    if architecture.permutes and tensor.endswith(".attn_k.weight"):
        return n_head_kv
    return None


def interleave_rows(matrix: NDArray[np.floating], n_heads: int) -> NDArray[np.floating]:
    """Reorder the rows of a Q or K matrix (out, any) from transformers' order to GGUF's.

    In each head, row i of the first half and row i of the second half become neighbours.
    """
    halves = matrix.reshape(n_heads, 2, matrix.shape[0] // n_heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def separate_rows(matrix: NDArray[np.floating], n_heads: int) -> NDArray[np.floating]:
    """The inverse of interleave_rows: from GGUF's order to transformers'."""
    neighbours = matrix.reshape(n_heads, matrix.shape[0] // n_heads // 2, 2, -1)
    return neighbours.swapaxes(1, 2).reshape(matrix.shape)
