"""A GGUF taken apart into entries and tensors, changed, and put together again.

Its own small reader and writer, independent of the product's: what comes out may be wrong in any
way, but where only one thing is changed, all else fits, so that the change gets past first checks.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from fuzzing.mutations import INTEGERS, spoil_bytes, spoil_json

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _ALIGNMENT = 8, 9, 32
_FLOATS = (0.0, -1.0, 1e-45, 1e30, 3.4e38, float("inf"), float("nan"), 1.0, 1e-5, 500.0)
_TEXTS = (b"", b"llama", b"gemma", b"mamba", b"x" * 300, b"\xff\xfe", b"gpt2", b"bert", b"none",
          b"{{ messages }}", b"{% for m in messages %}", b"yarn", b"su", b"longrope", b"t5",
          b"rwkv", b"\x00",
          b"qwen2", b"phi3", b"adapter", b"{{ raise_exception('x') }}")  # fmt: skip

Rng = random.Random


@dataclass
class Parts:
    """Entries as (key, type, bytes of the value); tensors as (name, dims, type, data)."""

    version: int
    entries: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    tensors: list[tuple[bytes, list[int], int, bytes]] = field(default_factory=list)


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, layout: str) -> int:
        (value,) = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(layout)
        return int(value)

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def value(self, kind: int) -> bytes:
        start = self.at
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item == _STRING:
                for _ in range(count):
                    self.text()
            else:
                self.take(_SIZES[item] * count)
        else:
            self.take(_SIZES[kind])
        return self.data[start : self.at]


def take_apart(data: bytes) -> Parts:
    """A sound file's parts."""
    cursor = _Cursor(data)
    cursor.take(4)
    parts = Parts(cursor.number("I"))
    n_tensors, n_entries = cursor.number("Q"), cursor.number("Q")
    for _ in range(n_entries):
        key, kind = cursor.text(), cursor.number("I")
        parts.entries.append((key, kind, cursor.value(kind)))
    heads = []
    for _ in range(n_tensors):
        name, n_dims = cursor.text(), cursor.number("I")
        dims = [cursor.number("Q") for _ in range(n_dims)]
        heads.append((name, dims, cursor.number("I"), cursor.number("Q")))
    start = -(-cursor.at // _ALIGNMENT) * _ALIGNMENT
    ends = [offset for *_, offset in heads[1:]] + [len(data) - start]
    for (name, dims, kind, offset), end in zip(heads, ends, strict=True):
        parts.tensors.append((name, dims, kind, data[start + offset : start + end]))
    return parts


def put_together(parts: Parts) -> bytes:
    """The file, with counts, lengths and offsets that fit."""
    head = b"GGUF" + struct.pack("<IQQ", parts.version, len(parts.tensors), len(parts.entries))
    for key, kind, value in parts.entries:
        head += _text(key) + struct.pack("<I", kind) + value
    body = b""
    for name, dims, kind, data in parts.tensors:
        head += _text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", kind, len(body))
        body += data + bytes(-len(data) % _ALIGNMENT)
    return head + bytes(-len(head) % _ALIGNMENT) + body


def spoil_gguf(data: bytes, rng: Rng) -> bytes:
    """One or a few changes of entries or tensors."""
    try:
        parts = take_apart(data)
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError):
        return spoil_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = _spoil_entry if rng.random() < 0.65 and parts.entries else _spoil_tensor
        change(parts, rng)
    try:
        return put_together(parts)
    except struct.error:
        return data


def _spoil_entry(parts: Parts, rng: Rng) -> None:
    at = rng.randrange(len(parts.entries))
    key, kind, value = parts.entries[at]
    match rng.randrange(12):
        case 0:
            del parts.entries[at]
        case 1:
            parts.entries.insert(rng.randrange(len(parts.entries) + 1), (key, kind, value))
        case 2:
            parts.entries[at] = (key + rng.choice((b"x", b"_swa", b".type")), kind, value)
        case 3:
            other = rng.choice(tuple(_SIZES))
            parts.entries[at] = (key, other, rng.randbytes(_SIZES[other]))
        case 4:
            parts.entries[at] = (key, kind, rng.choice(parts.entries)[2])
        case 5:
            parts.entries.append(_extra(parts, rng))
        case _:
            parts.entries[at] = (key, kind, _other_value(kind, value, rng))


def _extra(parts: Parts, rng: Rng) -> tuple[bytes, int, bytes]:
    """An entry that llama.cpp reads where it is there."""
    architecture = next((v[8:] for k, _, v in parts.entries if k == b"general.architecture"), b"")
    name = rng.choice(
        (b"rope.scaling.type", b"rope.scaling.factor", b"attention.sliding_window", b"expert_count",
         b"expert_used_count", b"attention.key_length_swa", b"embedding_length_out", b"vocab_size",
         b"rope.dimension_count_swa", b"attention.causal", b"pooling_type", b"logit_scale",
         b"rope.dimension_sections", b"attention.sliding_window_pattern", b"nextn_predict_layers",
         b"attention.clamp_kqv", b"attention.max_alibi_bias", b"final_logit_softcapping",
         b"attention.scale", b"residual_scale", b"embedding_scale", b"rope.scaling.attn_factor",
         b"rope.scaling.original_context_length", b"rope.scaling.yarn_log_multiplier",
         b"attention.value_length", b"leading_dense_block_count", b"classifier.output_labels")
    )  # fmt: skip
    key = rng.choice((architecture + b"." + name, b"general.alignment", b"split.count",
                      b"tokenizer.ggml.eot_token_id", b"tokenizer.ggml.precompiled_charsmap",
                      b"tokenizer.ggml.add_space_prefix", b"tokenizer.ggml.fim_pre_token_id",
                      b"tokenizer.ggml.remove_extra_whitespaces", b"general.quantization_version",
                      b"tokenizer.ggml.padding_token_id", b"tokenizer.ggml.token_type_count",
                      b"adapter.alora.invocation_tokens", b"general.file_type",
                      b"edgelora.base.id"))  # fmt: skip
    kind = rng.choice((4, 4, 5, 6, 6, 7, 8, 9, 10))
    return key, kind, _any_value(kind, rng)


def _any_value(kind: int, rng: Rng) -> bytes:
    if kind == _STRING:
        return _text(rng.choice(_TEXTS))
    if kind == _ARRAY:
        item, count = rng.choice((0, 4, 5, 6, 7)), rng.choice((0, 1, 2, 4, 300))
        values = b"".join(_any_value(item, rng) for _ in range(count))
        return struct.pack("<IQ", item, count) + values
    if kind == 6:
        return struct.pack("<f", rng.choice(_FLOATS))
    if kind == 12:
        return struct.pack("<d", rng.choice(_FLOATS))
    size = _SIZES[kind]
    return (rng.choice(INTEGERS) % (1 << 8 * size)).to_bytes(size, "little")


def _other_value(kind: int, value: bytes, rng: Rng) -> bytes:
    if kind == _STRING:
        inside = value[8:]
        if inside[:1] in b"{[" and rng.random() < 0.8:
            return _text(spoil_json(inside, rng))
        return _text(spoil_bytes(inside, rng) if inside and rng.random() < 0.6
                     else rng.choice(_TEXTS))  # fmt: skip
    if kind == _ARRAY:
        return _other_array(value, rng)
    return _any_value(kind, rng)


def _other_array(value: bytes, rng: Rng) -> bytes:
    """Another count, other items, or one item less; the bytes still end where they should."""
    item, count = struct.unpack_from("<IQ", value)
    cursor = _Cursor(value)
    cursor.at = 12
    items = [cursor.value(item) for _ in range(count)]
    if not items:
        return value
    at = rng.randrange(len(items))
    match rng.randrange(7):
        case 0:
            del items[at]
        case 1:
            items = items[:at]
        case 2:
            items[at] = items[rng.randrange(len(items))]
        case 3:
            items += [items[at]] * rng.choice((1, 500))
        case 4:
            rng.shuffle(items)
        case _:
            for _ in range(rng.choice((1, 1, 30))):
                at = rng.randrange(len(items))
                items[at] = _other_value(item, items[at], rng)
    return struct.pack("<IQ", item, len(items)) + b"".join(items)


def _spoil_tensor(parts: Parts, rng: Rng) -> None:
    if not parts.tensors:
        return
    at = rng.randrange(len(parts.tensors))
    name, dims, kind, data = parts.tensors[at]
    match rng.randrange(10):
        case 0:
            del parts.tensors[at]
        case 1:
            parts.tensors.append((name + rng.choice((b"", b"x", b"2")), dims, kind, data))
        case 2:
            parts.tensors[at] = (name, dims[::-1], kind, data)
        case 3:
            parts.tensors[at] = (rng.choice(parts.tensors)[0], dims, kind, data)
        case 4:
            rng.shuffle(parts.tensors)
        case 5:
            parts.tensors[at] = (name, *_resized(dims, kind, data, rng))
        case 6:
            parts.tensors[at] = (name, [*dims, 1] if rng.random() < 0.5 else dims[1:], kind, data)
        case 7:
            changed = [*dims]
            changed[rng.randrange(len(dims) or 1) :][:1] = [rng.choice(INTEGERS)]
            parts.tensors[at] = (name, changed, kind, data)
        case 8:
            parts.tensors[at] = (name, dims, rng.choice((0, 1, 2, 8, 12, 24, 30, 35, 99)), data)
        case _:
            parts.tensors[at] = (name, dims, kind, spoil_bytes(data, rng)[: len(data)]
                                 .ljust(len(data), b"\x7f"))  # fmt: skip


def _resized(dims: list[int], kind: int, data: bytes, rng: Rng) -> tuple[list[int], int, bytes]:
    """Another number of rows or columns, in a type of four bytes, with the bytes that it needs."""
    shape = [max(1, size + rng.choice((-1, 1, size, -size // 2))) for size in dims] or [1]
    n = 1
    for size in shape:
        n *= size
    if n > 1 << 18:
        return dims, kind, data
    return shape, 0, (data * (4 * n // max(len(data), 1) + 1))[: 4 * n].ljust(4 * n, b"\0")


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value
