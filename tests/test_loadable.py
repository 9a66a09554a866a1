"""Headers that llama.cpp would not survive are refused in Python; those of real kinds are not."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pico
import pytest
from fuzzing.gguf_parts import Parts, put_together, take_apart

from edgelora.adapters.base import read_base
from edgelora.engine.loadable import refuse_unloadable
from edgelora.errors import EdgeLoRAError

UINT32, FLOAT32, STRING = 4, 6, 8
EPSILON = "attention.layer_norm_rms_epsilon"


def check(path: Path, parts: Parts) -> None:
    path.write_bytes(put_together(parts))
    refuse_unloadable(read_base(path))


def with_entry(parts: Parts, key: str, kind: int, value: bytes) -> Parts:
    kept = [entry for entry in parts.entries if entry[0] != key.encode()]
    return Parts(parts.version, [*kept, (key.encode(), kind, value)], parts.tensors)


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


@pytest.mark.parametrize("architecture", pico.ARCHITECTURES)
@pytest.mark.parametrize("vocabulary", ["spm", "bpe"])
def test_bases_that_load_pass(architecture: str, vocabulary: str, tmp_path: Path) -> None:
    path = pico.write_base(tmp_path / "b.gguf", architecture, vocabulary=vocabulary)
    refuse_unloadable(read_base(path))


@pytest.mark.parametrize(
    ("key", "kind", "value", "what"),
    [
        ("llama.block_count", UINT32, number(513), "513 blocks"),
        ("llama.block_count", UINT32, number(2**31 - 1), "2147483647 blocks"),
        ("llama.nextn_predict_layers", UINT32, number(3), "nextn_predict_layers is 3"),
        ("llama.expert_count", UINT32, number(2000), "expert_count is 2000"),
        ("llama.expert_count", UINT32, number(8), "0 of 8 experts"),
        ("llama.expert_used_count", UINT32, number(2), "2 of 0 experts"),
        ("llama.rope.scaling.type", STRING, text("su"), "rope.scaling.type is 'su'"),
        (f"llama.{EPSILON}", FLOAT32, struct.pack("<f", -1), "rms_epsilon is -1.0"),
        (f"llama.{EPSILON}", FLOAT32, struct.pack("<f", math.nan), "rms_epsilon is nan"),
        ("llama.attention.head_count_kv", UINT32, number(3), "4 heads cannot share 3"),
        ("llama.attention.value_length", UINT32, number(16), "8 numbers for keys, 16 for values"),
        ("llama.rope.dimension_count", UINT32, number(4), "4 numbers of a head of 8"),
        ("llama.rope.dimension_count", UINT32, number(0), "0 numbers of a head of 8"),
        ("llama.rope.dimension_count", UINT32, number(7), "7 numbers of a head of 8"),
        ("tokenizer.ggml.model", STRING, text("none"), "its tokenizer is 'none'"),
        ("tokenizer.ggml.model", UINT32, number(1), "its tokenizer is '1'"),
        ("tokenizer.ggml.tokens", STRING, text("a"), "tokens is not a list"),
    ],
)
def test_a_header_that_would_end_the_process(
    key: str, kind: int, value: bytes, what: str, tmp_path: Path
) -> None:
    parts = take_apart(pico.write_base(tmp_path / "b.gguf").read_bytes())
    with pytest.raises(EdgeLoRAError, match=what):
        check(tmp_path / "changed.gguf", with_entry(parts, key, kind, value))


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [(b"<s>", b"</s>", "1 tokens come twice"), (b"<0x41>", b"<0x_1>", "")],
)
def test_a_vocabulary_that_would_end_the_process(
    old: bytes, new: bytes, what: str, tmp_path: Path
) -> None:
    """A byte token may be missing where the byte itself is a token: `A` here is."""
    parts = take_apart(pico.write_base(tmp_path / "b.gguf").read_bytes())
    tokens = next(value for key, _, value in parts.entries if key == b"tokenizer.ggml.tokens")
    packed = [struct.pack("<Q", len(word)) + word for word in (old, new)]
    changed = with_entry(parts, "tokenizer.ggml.tokens", 9, tokens.replace(*packed, 1))
    if not what:
        check(tmp_path / "changed.gguf", changed)
        return
    with pytest.raises(EdgeLoRAError, match=what):
        check(tmp_path / "changed.gguf", changed)


@pytest.mark.parametrize("architecture", pico.ARCHITECTURES)
def test_other_heads_than_the_matrices_are_for(architecture: str, tmp_path: Path) -> None:
    parts = take_apart(pico.write_base(tmp_path / "b.gguf", architecture).read_bytes())
    changed = with_entry(parts, f"{architecture}.attention.head_count", UINT32, number(32))
    with pytest.raises(EdgeLoRAError, match=r"blk\.0\.attn_q.*, not \d+ heads of"):
        check(tmp_path / "changed.gguf", changed)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_attention_without_its_weights(architecture: str, tmp_path: Path) -> None:
    """llama.cpp takes the three matrices or one of all three, and without any it reads at 0."""
    parts = take_apart(pico.write_base(tmp_path / "b.gguf", architecture).read_bytes())
    gone = (b"blk.1.attn_k.weight", b"blk.1.attn_qkv.weight")
    parts.tensors[:] = [tensor for tensor in parts.tensors if tensor[0] not in gone]
    with pytest.raises(EdgeLoRAError, match=r"blk\.1\.attn_k\.weight is missing"):
        check(tmp_path / "changed.gguf", parts)


def test_a_missing_byte(tmp_path: Path) -> None:
    parts = take_apart(pico.write_base(tmp_path / "b.gguf").read_bytes())
    tokens = next(value for key, _, value in parts.entries if key == b"tokenizer.ggml.tokens")
    changed = with_entry(parts, "tokenizer.ggml.tokens", 9, tokens.replace(b"<0xFF>", b"<0x_F>"))
    with pytest.raises(EdgeLoRAError, match="1 of the 256 byte tokens are missing, such as <0xFF>"):
        check(tmp_path / "changed.gguf", changed)
