"""What the header of a base must say for its gradient, and the refusal of all that is not known.

Exactly llama.cpp's graphs of `llama` (Mistral too), `qwen2` and `qwen3` (src/models/*.cpp). Not
covered, refused by name: experts, other RoPE scalings than linear and rope_freqs, every tensor
that is not listed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.architectures import EMBEDDING, OUTPUT
from edgelora.adapters.base import Base
from edgelora.engine.dequantize import is_readable
from edgelora.errors import InvalidFile, UnsupportedFile
from edgelora.gguf_file import GGUFFile, Metadata
from edgelora.gradient.weights import Array

ROPE_FACTORS = "rope_freqs.weight"
OUTPUT_NORM = "output_norm.weight"
MAX_PROBLEMS = 20
# Which pairs RoPE turns: halves (NEOX) or, in llama's permuted files, neighbours.
_NEOX = {"llama": False, "qwen2": True, "qwen3": True}
# Keys that would change the graph; llama.cpp's defaults are harmless.
_NEUTRAL = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.alpha": 0.0,
    "attention.clamp_kqv": 0.0,
    "expert_count": 0,
}


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of one decoder.

    Attributes:
        n_ctx: tokens that the model was trained with; longer texts are refused.
        head_dim: width of a head, all of which RoPE turns.
        scale: what Q K^T is multiplied by.
        rope_base: RoPE's theta; rope_scale divides positions (1: not scaled).
        neox: RoPE turns pairs of halves, not neighbours.
        window: tokens that attention reaches back; longer texts are refused (0: no limit).
        head: the tensor that makes logits.
    """

    n_layer: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int
    head_dim: int
    eps: float
    scale: float
    rope_base: float
    rope_scale: float
    neox: bool
    window: int
    head: str


def read_hyperparameters(base: Base, gguf: GGUFFile) -> Hyperparameters:
    """The numbers, once everything in the file is known to be computed as llama.cpp does.

    Raises:
        UnsupportedFile: another architecture, RoPE scaling, tensor or weight type; all are named.
        InvalidFile: a tensor is missing or has another shape than the header says.
    """
    if base.architecture not in _NEOX:
        raise UnsupportedFile(
            f"{base.path}: gradients of {base.architecture} are not known here "
            f"(only of {', '.join(_NEOX)})",
            hint="Refine with forward passes instead: --refine forward.",
        )
    numbers = _Numbers(base.architecture, gguf.metadata)
    found = Hyperparameters(
        n_layer=base.n_layer,
        n_head=base.n_head,
        n_head_kv=base.n_head_kv,
        n_vocab=base.n_vocab,
        n_ctx=int(numbers.get("context_length")),
        head_dim=base.head_dim,
        eps=numbers.get("attention.layer_norm_rms_epsilon"),
        scale=numbers.get("attention.scale", 0.0) or base.head_dim**-0.5,
        rope_base=numbers.get("rope.freq_base", 10000.0),
        rope_scale=_rope_scale(numbers),
        neox=_NEOX[base.architecture],
        window=int(numbers.get("attention.sliding_window", 0)),
        head=base.head,
    )
    for key, neutral in _NEUTRAL.items():
        if numbers.get(key, neutral) != neutral:
            numbers.problems.append(f"{base.architecture}.{key} is {numbers.get(key)}")
    if numbers.get("rope.dimension_count", base.head_dim) != base.head_dim:
        numbers.problems.append("RoPE turns a part of each head only")
    problems = numbers.problems + _unknown_tensors(base, gguf)
    if problems:
        raise UnsupportedFile(
            f"{base.path}: has what gradients are not known of", problems=problems[:MAX_PROBLEMS]
        )
    _refuse_misshapen(base, gguf)
    return found


def rope_angles(
    model: Hyperparameters, positions: NDArray[np.int64], factors: Array | None
) -> tuple[Array, Array]:
    """cos and sin of position / (scale factor_i) base^(-2i / n), (t, n / 2) float64 each."""
    exponents = np.arange(0, model.head_dim, 2) / model.head_dim
    frequencies = model.rope_base**-exponents / model.rope_scale
    if factors is not None:
        frequencies = frequencies / factors.astype(np.float64)
    angles = np.outer(positions.astype(np.float64), frequencies)
    return np.cos(angles), np.sin(angles)


class _Numbers:
    """Reads numbers of the architecture, and keeps a list of those that are unusable."""

    def __init__(self, architecture: str, metadata: Metadata) -> None:
        self.architecture = architecture
        self.metadata = metadata
        self.problems: list[str] = []

    def text(self, key: str) -> str:
        return str(self.metadata.get(f"{self.architecture}.{key}", ""))

    def get(self, key: str, default: float | None = None) -> float:
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if isinstance(value, int | float) and np.isfinite(value) and value >= 0:
            return float(value)
        self.problems.append(f"{name} is {value!r}, expected a number")
        return 1.0


def _rope_scale(numbers: _Numbers) -> float:
    """The divisor of positions; kinds of scaling other than linear become problems."""
    kind = numbers.text("rope.scaling.type") or "linear"
    if kind not in ("none", "linear"):
        numbers.problems.append(f"RoPE scaling of the kind {kind}")
    old = numbers.get("rope.scale_linear", 0.0)
    factor = numbers.get("rope.scaling.factor", old) or 1.0
    return factor if kind == "linear" else 1.0


def _expected(base: Base) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Tensor names and shapes that must be there, and those that may."""
    d, n_q, n_kv = base.n_embd, base.n_head * base.head_dim, base.n_head_kv * base.head_dim
    n_ff = base.shapes.get("blk.0.ffn_up.weight", (0,))[0]
    must: dict[str, tuple[int, ...]] = {EMBEDDING: (base.n_vocab, d), OUTPUT_NORM: (d,)}
    may: dict[str, tuple[int, ...]] = {OUTPUT: (base.n_vocab, d)}
    if base.architecture == "llama":
        may[ROPE_FACTORS] = (base.head_dim // 2,)
    matrices = {
        "attn_q": (n_q, d), "attn_k": (n_kv, d), "attn_v": (n_kv, d), "attn_output": (d, n_q),
        "ffn_gate": (n_ff, d), "ffn_up": (n_ff, d), "ffn_down": (d, n_ff),
    }  # fmt: skip
    norms: dict[str, tuple[int, ...]] = {"attn_norm": (d,), "ffn_norm": (d,)}
    if base.architecture == "qwen3":
        norms |= {"attn_q_norm": (base.head_dim,), "attn_k_norm": (base.head_dim,)}
    for layer in range(base.n_layer):
        for part, shape in (matrices | norms).items():
            must[f"blk.{layer}.{part}.weight"] = shape
        for part, shape in matrices.items():
            may[f"blk.{layer}.{part}.bias"] = (shape[0],)
    return must, may


def _unknown_tensors(base: Base, gguf: GGUFFile) -> list[str]:
    must, may = _expected(base)
    unknown = [f"the tensor {name}" for name in gguf.tensors if name not in must | may]
    return unknown + [
        f"{name}: weights of type {info.ggml_type.name}"
        for name, info in gguf.tensors.items()
        if not is_readable(info.ggml_type)
    ]


def _refuse_misshapen(base: Base, gguf: GGUFFile) -> None:
    must, may = _expected(base)
    problems = [f"{name} is missing" for name in must if name not in gguf.tensors]
    for name, info in gguf.tensors.items():
        wanted = (must | may)[name]
        if info.shape != wanted:
            problems.append(f"{name} has shape {info.shape}, expected {wanted}")
    if base.n_head % base.n_head_kv:
        problems.append(f"{base.n_head} heads for {base.n_head_kv} key heads")
    if base.head_dim % 2:
        problems.append(f"heads of the odd width {base.head_dim}")
    if problems:
        raise InvalidFile(f"{base.path}: not a sound model", problems=problems[:MAX_PROBLEMS])
