"""Pico models: real GGUF bases of under 200 KB with random weights, and random adapters for them.

Each loads in llama.cpp and decodes. Everything is seeded: the same arguments give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import PairPlan, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.gguf_file import open_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "phi3", "gpt2")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPM_BASES = ("llama", "gemma", "phi3")
_WORDS = "the and of to in is it you that he was for on are with his they at be this have from"


@dataclass(frozen=True)
class Dims:
    """Sizes of a pico model; head_dim times n_head need not be n_embd for qwen3 and gemma."""

    n_embd: int = 32
    n_ff: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 8
    n_ctx: int = 512


def dims_of(architecture: str) -> Dims:
    """The default sizes: GQA everywhere but in gpt2, wide heads in qwen3 and gemma."""
    if architecture == "gpt2":
        return Dims(n_head_kv=4)
    return Dims(head_dim=16) if architecture in ("qwen3", "gemma") else Dims()


def write_base(
    path: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    tied: bool = True,
    vocabulary: str | None = None,
    chat_template: str | None = CHATML,
    dtype: str = "F32",
    dims: Dims | None = None,
    name: str = "pico",
    norm_seed: int | None = None,
) -> Path:
    """Write a base that llama.cpp loads.

    Args:
        vocabulary: "spm" or "bpe"; by default what the architecture's models have.
        dtype: of the matrices, a name of gguf's types: F32, F16, BF16, Q8_0, Q4_0, Q4_1 ...
        norm_seed: another seed for the norms only (a fine-tune, as far as identity goes).
    """
    dims = dims or dims_of(architecture)
    vocabulary = vocabulary or ("spm" if architecture in SPM_BASES else "bpe")
    writer = GGUFWriter(None, architecture)
    writer.add_name(name)
    _write_sizes(writer, architecture, dims)
    n_vocab = (_write_spm if vocabulary == "spm" else _write_bpe)(writer)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    writer.add_vocab_size(n_vocab)
    shapes = base_shapes(architecture, dims, n_vocab, tied=tied)
    for tensor, values in _weights(shapes, seed, norm_seed):
        if values.ndim == 1 or dtype == "F32":
            writer.add_tensor(tensor, values)
        else:
            kind = GGMLQuantizationType[dtype]
            writer.add_tensor(tensor, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def base_shapes(
    architecture: str, dims: Dims, n_vocab: int, *, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes (out, in), as llama.cpp's src/models/*.cpp want them."""
    d, n_q, n_kv = dims.n_embd, dims.n_head * dims.head_dim, dims.n_head_kv * dims.head_dim
    fused = architecture in ("phi3", "gpt2")
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, d)}
    if architecture == "gpt2":
        shapes["position_embd.weight"] = (dims.n_ctx, d)
    shapes["output_norm.weight"] = (d,)
    if not tied and architecture != "gemma":
        shapes["output.weight"] = (n_vocab, d)
    block: dict[str, tuple[int, ...]] = {"attn_norm": (d,), "ffn_norm": (d,)}
    if fused:
        block["attn_qkv"] = (n_q + 2 * n_kv, d)
    else:
        block |= {"attn_q": (n_q, d), "attn_k": (n_kv, d), "attn_v": (n_kv, d)}
    block["attn_output"] = (d, n_q)
    if architecture == "qwen3":
        block |= {"attn_q_norm": (dims.head_dim,), "attn_k_norm": (dims.head_dim,)}
    if not fused:
        block["ffn_gate"] = (dims.n_ff, d)
    block["ffn_up"] = (2 * dims.n_ff if architecture == "phi3" else dims.n_ff, d)
    block["ffn_down"] = (d, dims.n_ff)
    for layer in range(dims.n_layer):
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in block.items()}
        for part in _biased(architecture):
            shapes[f"blk.{layer}.{part}.bias"] = (block[part][0],)
    if architecture == "gpt2":
        shapes["output_norm.bias"] = (d,)
    return shapes


def _biased(architecture: str) -> Sequence[str]:
    if architecture == "qwen2":
        return ("attn_q", "attn_k", "attn_v")
    if architecture == "gpt2":
        return ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    return ()


def _weights(
    shapes: dict[str, tuple[int, ...]], seed: int, norm_seed: int | None
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Values with which hidden states stay of order 1 and logits differ by several nats."""
    for index, (name, shape) in enumerate(shapes.items()):
        is_norm = name.endswith("norm.weight")
        own_seed = norm_seed if is_norm and norm_seed is not None else seed
        values = np.random.default_rng([own_seed, index]).standard_normal(shape)
        if is_norm:
            values = 1.0 + 0.1 * values
        elif len(shape) == 1:
            values = 0.1 * values
        elif name not in ("token_embd.weight", "position_embd.weight"):
            values = values / np.sqrt(shape[1])
        yield name, values.astype(np.float32)


def _write_sizes(writer: GGUFWriter, architecture: str, dims: Dims) -> None:
    writer.add_context_length(dims.n_ctx)
    writer.add_embedding_length(dims.n_embd)
    writer.add_feed_forward_length(dims.n_ff)
    writer.add_block_count(dims.n_layer)
    writer.add_head_count(dims.n_head)
    writer.add_head_count_kv(dims.n_head_kv)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(dims.head_dim)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)


def _write_spm(writer: GGUFWriter) -> int:
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    types = [TokenType.UNKNOWN] + [TokenType.CONTROL] * 4
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [TokenType.BYTE] * 256
    pieces = _spm_pieces()
    tokens += pieces
    types += [TokenType.NORMAL] * len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 261 + [-float(i) for i in range(len(pieces))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    return len(tokens)


def _spm_pieces() -> list[str]:
    """Every prefix of some common words, longest words first, then single characters."""
    prefixes = {f"▁{word}"[:size] for word in _WORDS.split() for size in range(2, len(word) + 2)}
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-<>|_\n"
    return sorted(prefixes, key=lambda piece: (-len(piece), piece)) + list(characters)


def _write_bpe(writer: GGUFWriter) -> int:
    merges = _bpe_merges()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_byte_characters()]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    return len(tokens)


def _bpe_merges() -> list[str]:
    merges: dict[str, None] = {}
    for word in _WORDS.split():
        spelled = f"Ġ{word}"
        for size in range(1, len(spelled)):
            merges[f"{spelled[:size]} {spelled[size]}"] = None
    return list(merges)


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, in the order of its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def write_random_lora(
    path: Path,
    base: Path,
    *,
    rank: int = 4,
    alpha: float | None = 8.0,
    parts: Sequence[str] = ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    layers: Sequence[int] | None = None,
    seed: int = 0,
    size: float = 0.5,
    dtype: str = "f32",
    metadata: dict[str, str | int | float | bool] | None = None,
) -> Path:
    """Write a random GGUF LoRA for `base`; parts that the base lacks are left out.

    `alpha` None bakes the scale 2 into lora_b.
    """
    gguf = open_gguf(base)
    plan = [
        PairPlan(name, rank, info.shape[1], info.shape[0])
        for name, info in gguf.tensors.items()
        if _part_of(name) in parts and (layers is None or int(name.split(".")[1]) in layers)
    ]
    write_lora(
        path,
        plan,
        random_pairs(plan, seed=seed, size=size, scale=alpha / rank if alpha else 2.0),
        architecture=gguf.metadata["general.architecture"],
        alpha=alpha,
        dtype=dtype,
        metadata=metadata,
    )
    return path


def random_pairs(
    plan: Sequence[PairPlan], *, seed: int, size: float = 0.5, scale: float = 1.0
) -> Iterator[LoraPair]:
    """Pairs in float32 whose update has entries of about `size` * scale * sqrt(rank / n_in)."""
    for index, p in enumerate(plan):
        rng = np.random.default_rng([seed, index])
        lora_a = rng.standard_normal((p.rank, p.n_in), dtype=np.float32) / np.float32(p.n_in**0.5)
        lora_b = rng.standard_normal((p.n_out, p.rank), dtype=np.float32) * np.float32(size)
        yield LoraPair(p.name, lora_a, lora_b, scale)


def _part_of(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1] if name.endswith(".weight") else ""


def peft_modules(architecture: str, dims: Dims | None = None) -> dict[str, tuple[int, int]]:
    """Hugging Face module paths of one layer (`{}` is its number) and their (out, in)."""
    dims = dims or dims_of(architecture)
    d, n_q, n_kv = dims.n_embd, dims.n_head * dims.head_dim, dims.n_head_kv * dims.head_dim
    if architecture == "gpt2":
        at = "transformer.h.{}."
        return {
            at + "attn.c_attn": (3 * d, d), at + "attn.c_proj": (d, d),
            at + "mlp.c_fc": (dims.n_ff, d), at + "mlp.c_proj": (d, dims.n_ff),
        }  # fmt: skip
    at = "model.layers.{}."
    shared = {at + "self_attn.o_proj": (d, n_q), at + "mlp.down_proj": (d, dims.n_ff)}
    if architecture == "phi3":
        return {
            at + "self_attn.qkv_proj": (n_q + 2 * n_kv, d),
            at + "mlp.gate_up_proj": (2 * dims.n_ff, d),
        } | shared
    return {
        at + "self_attn.q_proj": (n_q, d), at + "self_attn.k_proj": (n_kv, d),
        at + "self_attn.v_proj": (n_kv, d), at + "mlp.gate_proj": (dims.n_ff, d),
        at + "mlp.up_proj": (dims.n_ff, d),
    } | shared  # fmt: skip


def write_peft(
    folder: Path,
    architecture: str = "llama",
    *,
    rank: int = 4,
    alpha: float = 8.0,
    modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "c_attn", "qkv_proj"),
    seed: int = 0,
    size: float = 0.5,
    dtype: type[np.floating] = np.float32,
    dims: Dims | None = None,
    config: dict[str, object] | None = None,
) -> Path:
    """Write a random PEFT adapter folder; `config` overrides entries of adapter_config.json."""
    from safetensors.numpy import save_file

    dims = dims or dims_of(architecture)
    chosen = {
        path: shape
        for path, shape in peft_modules(architecture, dims).items()
        if path.rsplit(".", 1)[1] in modules
    }
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(dims.n_layer):
        for path, (n_out, n_in) in chosen.items():
            prefix = f"base_model.model.{path.format(layer)}"
            lora_a = rng.standard_normal((rank, n_in)) / np.sqrt(n_in)
            tensors[f"{prefix}.lora_A.weight"] = lora_a.astype(dtype)
            tensors[f"{prefix}.lora_B.weight"] = (size * rng.standard_normal((n_out, rank))).astype(
                dtype
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "target_modules": sorted({path.rsplit(".", 1)[1] for path in chosen}), "bias": "none",
        "fan_in_fan_out": architecture == "gpt2", "use_rslora": False, "use_dora": False,
        "base_model_name_or_path": f"pico/{architecture}", "lora_dropout": 0.0,
        "inference_mode": True,
    } | (config or {})  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    return folder
