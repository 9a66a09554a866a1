"""Files with the shape of a real model and random values: a base GGUF, adapters, a whole bank.

    python scripts/make_shape.py mistral-7b out/ --base q4_0 --peft 2 --gguf 8
    python scripts/make_shape.py mistral-7b out/ --bank 500
    python scripts/make_shape.py tinyllama-1.1b out/ --base f16 --sparse

They cost what the real ones cost, in time and memory, and answer nothing. The vocabulary is made up
(SentencePiece, the right size, a token for each letter of a text) or, with --vocabulary, that of
another GGUF, e.g. models/catalogue/mistral-7b-v0.1.vocabulary.gguf: then texts take as many tokens
as they do there. --bank converts PEFT folders one by one, as `edgelora bank add` does, into
out/bank (18.9 MB each at 7B; run again, it goes on), with signatures that are drawn, not embedded.
--sparse writes the header and the norms, and leaves the matrices to the file system as a hole of
zeros: enough for names, shapes and identity, not for decoding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import PairPlan, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.bank import Facts, open_bank
from edgelora.gguf_file import open_gguf
from edgelora.signature import Signature, summarise

POOL = 1 << 20
CHUNK_BYTES = 64 << 20
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
DTYPES = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of llama.cpp's `llama` architecture."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def modules(self) -> dict[str, tuple[str, int, int]]:
        """GGUF part -> Hugging Face module of one layer, out, in."""
        d, kv = self.n_embd, self.n_head_kv * self.head_dim
        return {
            "attn_q": ("self_attn.q_proj", d, d),
            "attn_k": ("self_attn.k_proj", kv, d),
            "attn_v": ("self_attn.v_proj", kv, d),
            "attn_output": ("self_attn.o_proj", d, d),
            "ffn_gate": ("mlp.gate_proj", self.n_ff, d),
            "ffn_up": ("mlp.up_proj", self.n_ff, d),
            "ffn_down": ("mlp.down_proj", d, self.n_ff),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the base."""
        yield "token_embd.weight", (self.n_vocab, self.n_embd)
        yield "output_norm.weight", (self.n_embd,)
        if not self.tied:
            yield "output.weight", (self.n_vocab, self.n_embd)
        for layer in range(self.n_layer):
            yield f"blk.{layer}.attn_norm.weight", (self.n_embd,)
            yield f"blk.{layer}.ffn_norm.weight", (self.n_embd,)
            for part, (_, n_out, n_in) in self.modules().items():
                yield f"blk.{layer}.{part}.weight", (n_out, n_in)


SHAPES = {
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 32000, 32768),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128256, 131072),
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4, 32000, 2048),
    "smollm2-360m": Shape(32, 960, 2560, 15, 5, 49152, 8192, tied=True),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, 8192, tied=True),
}


def write_base(
    path: Path,
    shape: Shape,
    *,
    dtype: str = "q4_0",
    seed: int = 0,
    sparse: bool = False,
    vocabulary: Path | None = None,
) -> Path:
    """A base GGUF; `dtype` is a lower-case name of gguf's types that gguf can quantise to.

    Raises:
        SystemExit: the GGUF `vocabulary` has not as many tokens as the shape.
    """
    writer = GGUFWriter(None, "llama")
    writer.add_name(path.stem)
    _add_sizes(writer, shape)
    if vocabulary is None:
        _add_vocabulary(writer, shape.n_vocab)
    else:
        _copy_vocabulary(writer, shape.n_vocab, vocabulary)
    writer.add_chat_template(TEMPLATE)
    matrix = GGMLQuantizationType[dtype.upper()]
    kinds = {
        name: matrix if len(size) == 2 else GGMLQuantizationType.F32
        for name, size in shape.tensors()
    }
    sizes = {name: n_bytes(size, kinds[name]) for name, size in shape.tensors()}
    for name, size in shape.tensors():
        dtype32 = np.dtype(np.float32)
        writer.add_tensor_info(name, size, dtype32, sizes[name], raw_dtype=kinds[name])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        at = -(-file.seek(0, 2) // 32) * 32
        for name, size in shape.tensors():
            file.seek(at)
            if not sparse or len(size) == 1:  # norms are a part of a base's identity
                for chunk in _values(name, size, kinds[name], seed):
                    file.write(chunk)
            at += -(-sizes[name] // 32) * 32
        file.truncate(at)
    return path


def n_bytes(size: Sequence[int], kind: GGMLQuantizationType) -> int:
    """The bytes of a tensor in this type."""
    block_size, type_size = GGML_QUANT_SIZES[kind]
    return int(np.prod(size)) // block_size * type_size


def _values(
    name: str, size: tuple[int, ...], kind: GGMLQuantizationType, seed: int
) -> Iterator[memoryview]:
    """Bytes of one tensor: a pool of random values, repeated from a random place of its own."""
    if len(size) == 1:
        yield np.ones(size, np.float32).data.cast("B")
        return
    rng = np.random.default_rng([seed, sum(name.encode())])
    values = rng.standard_normal(POOL, dtype=np.float32) / np.float32(size[1] ** 0.5)
    pool = quantize(values, kind).view(np.uint8).reshape(-1)
    left = n_bytes(size, kind)
    repeated = np.tile(pool, max(1, min(CHUNK_BYTES, left) // pool.size + 1))
    while left > 0:
        part = min(left, repeated.size // pool.size * pool.size)
        yield repeated[:part].data
        left -= part


def _add_sizes(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_block_count(shape.n_layer)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.n_vocab)


def _add_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    tokens += list("▁abcdefghijklmnopqrstuvwxyz")
    tokens += [f"▁{i}" for i in range(n_vocab - len(tokens))]
    kinds += [TokenType.NORMAL] * (n_vocab - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(n_vocab)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def _copy_vocabulary(writer: GGUFWriter, n_vocab: int, path: Path) -> None:
    """The SentencePiece tokenizer of a GGUF, as scripts/make_vocabulary.py writes one."""
    found = {key.removeprefix("tokenizer.ggml."): value
             for key, value in open_gguf(path).metadata.items()}  # fmt: skip
    if len(found.get("tokens", ())) != n_vocab:
        raise SystemExit(f"{path}: {n_vocab} tokens are needed, not {len(found.get('tokens', ()))}")
    writer.add_tokenizer_model(found["model"])
    writer.add_tokenizer_pre(found["pre"])
    writer.add_token_list(found["tokens"])
    writer.add_token_scores(found["scores"].tolist())
    writer.add_token_types(found["token_type"].tolist())
    writer.add_bos_token_id(found["bos_token_id"])
    writer.add_eos_token_id(found["eos_token_id"])
    writer.add_unk_token_id(found["unknown_token_id"])
    writer.add_add_bos_token(found["add_bos_token"])
    writer.add_add_space_prefix(found["add_space_prefix"])


def _draw(
    rng: np.random.Generator, n_out: int, n_in: int, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """lora_a (r, in) and lora_b (out, r) in float32, about as large as trained ones."""
    lora_a = rng.standard_normal((rank, n_in), dtype=np.float32) / np.float32(n_in**0.5)
    return lora_a, rng.standard_normal((n_out, rank), dtype=np.float32) * np.float32(0.01)


def write_peft(
    folder: Path,
    shape: Shape,
    *,
    rank: int = 16,
    alpha: float = 32,
    modules: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    dtype: str = "F32",
    seed: int = 0,
) -> Path:
    """A PEFT adapter folder."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(shape.n_layer):
        for module, n_out, n_in in shape.modules().values():
            if module.rpartition(".")[2] in modules:
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                lora_a, lora_b = _draw(rng, n_out, n_in, rank)
                tensors[f"{prefix}.lora_A.weight"] = lora_a.astype(DTYPES[dtype])
                tensors[f"{prefix}.lora_B.weight"] = lora_b.astype(DTYPES[dtype])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "target_modules": list(modules), "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "inference_mode": True, "lora_dropout": 0.0,
        "base_model_name_or_path": "random",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def write_gguf_lora(
    path: Path,
    shape: Shape,
    *,
    rank: int = 16,
    alpha: float = 32,
    parts: Sequence[str] = ("attn_q", "attn_k", "attn_v"),
    dtype: str = "f16",
    seed: int = 0,
) -> Path:
    """A GGUF LoRA with the same kind of values (not those of write_peft)."""
    sizes = {part: size[1:] for part, size in shape.modules().items() if part in parts}
    plan = [
        PairPlan(f"blk.{layer}.{part}.weight", rank, n_in, n_out)
        for layer in range(shape.n_layer)
        for part, (n_out, n_in) in sizes.items()
    ]
    return write_planned_lora(path, plan, alpha=alpha, dtype=dtype, seed=seed)


def write_planned_lora(
    path: Path,
    plan: Sequence[PairPlan],
    *,
    architecture: str = "llama",
    alpha: float = 32,
    dtype: str = "f16",
    seed: int = 0,
) -> Path:
    """A GGUF LoRA of these tensors."""
    rng = np.random.default_rng(seed)
    pairs = (LoraPair(p.name, *_draw(rng, p.n_out, p.n_in, p.rank), alpha / p.rank) for p in plan)
    write_lora(path, plan, pairs, architecture=architecture, alpha=alpha, dtype=dtype)
    return path


def draw_signature(shape: Shape, base_id: str, *, seed: int = 0) -> Signature:
    """What a dataset of 64 examples might look like: near others, far from the origin."""
    shared, rng = np.random.default_rng(0), np.random.default_rng([seed, 1])
    offset = 5 * shared.standard_normal(shape.n_embd, dtype=np.float32)
    fields = []
    for _ in range(2):
        centre = offset + rng.standard_normal(shape.n_embd, dtype=np.float32)
        fields.append(centre + rng.standard_normal((64, shape.n_embd), dtype=np.float32))
    ids = np.minimum(rng.zipf(1.3, size=(64, 40)), shape.n_vocab - 1)
    return summarise(*fields, ids.tolist(), n_vocab=shape.n_vocab, base_id=base_id)


def write_bank(
    folder: Path, shape: Shape, base: Path, count: int, *, rank: int = 16, alpha: float = 32
) -> Path:
    """A bank of `count` adapters converted from F16 PEFT folders; those that it has are left."""
    header = read_base(base)
    bank = open_bank(folder, create=True)
    known = {record.name for record in bank.records() if record.has_signature}
    for i in range(count):
        name = f"random{i:05}"
        if name in known:
            continue
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            source = write_peft(
                Path(scratch) / name, shape, rank=rank, alpha=alpha, dtype="F16", seed=i
            )
            bank.add(source, header, name=name, facts=Facts(licence="CC0-1.0"))
        bank.set_signature(name, draw_signature(shape, header.identity.id, seed=i))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", metavar="TYPE", help="write a base: q4_0, q8_0, f16, f32 ...")
    parser.add_argument("--vocabulary", type=Path, help="a GGUF whose tokenizer the base gets")
    parser.add_argument("--sparse", action="store_true", help="a base without values")
    parser.add_argument("--peft", type=int, default=0, metavar="N", help="PEFT adapters")
    parser.add_argument("--gguf", type=int, default=0, metavar="N", help="GGUF adapters")
    parser.add_argument("--bank", type=int, default=0, metavar="N", help="a bank of N adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="F32", help="of PEFT adapters")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape, folder = SHAPES[options.shape], options.folder
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"rank": options.rank, "alpha": options.alpha}
    made = []
    if options.base:
        path = folder / f"{options.shape}-{options.base}.gguf"
        write_base(path, shape, dtype=options.base, seed=options.seed, sparse=options.sparse,
                   vocabulary=options.vocabulary)  # fmt: skip
        made.append(path)
    for i in range(options.seed, options.seed + options.peft):
        path = folder / f"peft-{i}"
        made.append(write_peft(path, shape, dtype=options.dtype, seed=i, **sizes))
    for i in range(options.seed, options.seed + options.gguf):
        made.append(write_gguf_lora(folder / f"lora-{i}.gguf", shape, seed=i, **sizes))
    if options.bank:
        base = folder / f"{options.shape}-header.gguf"
        if not base.exists():
            write_base(base, shape, sparse=True, vocabulary=options.vocabulary)
        made.append(write_bank(folder / "bank", shape, base, options.bank, **sizes))
    print(*made or ["nothing asked for: --base, --peft, --gguf or --bank"], sep="\n")


if __name__ == "__main__":
    main()
