"""Random changes of a file's bytes, of JSON, of safetensors, and of lines of text.

Everything is drawn from the `random.Random` that is given, so that a seed gives the same input.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

INTEGERS = (
    0, 1, 2, 3, 7, 8, 31, 32, 127, 128, 255, 256, 1000, 4095, 1 << 15, (1 << 16) - 1, 1 << 20,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1,
    (1 << 64) - 1,
)  # fmt: skip
_TEXTS = (
    "", " ", "\0", "a" * 5000, "é" * 40, "\ud800", "\u202e", "../../x", "/etc/passwd", "CON",
    "[red]", "{prompt}", "{{ 1/0 }}", "{% for i in range(10**9) %}x{% endfor %}", "%s%n", "\x1b[2J",
    "nan", "(a+)+$", "(.*.*.*.*.*.*.*.*.*)*!", ".*(.*)*proj", "((", "[", "all-linear",
    "\r\n", "LORA", "U8",
)  # fmt: skip
_NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 1.5, -0.0, 1e-320, 1e30, 1e308, -1e308, float("nan"), float("inf"), 1 << 31,
    1 << 63, -(1 << 63), 10**30, 10**400, 4.0, 1e16,
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [1, "a", {}])

Rng = random.Random


def spoil_bytes(data: bytes, rng: Rng) -> bytes:
    """One change that knows nothing of the format."""
    change = rng.choice(_BYTE_CHANGES)
    return change(bytearray(data), rng)


def _place(data: bytearray, rng: Rng) -> int:
    """Any byte, those of the header more often."""
    return rng.randrange(min(len(data), rng.choice((64, 1024, 1 << 40))) or 1)


def _flip(data: bytearray, rng: Rng) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if data:
            data[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _set(data: bytearray, rng: Rng) -> bytes:
    at = _place(data, rng)
    data[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])
    return bytes(data)


def _cut(data: bytearray, rng: Rng) -> bytes:
    return bytes(data[: _place(data, rng)])


def _delete(data: bytearray, rng: Rng) -> bytes:
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 4, 8, rng.randrange(1, 2000)))]
    return bytes(data)


def _repeat(data: bytearray, rng: Rng) -> bytes:
    at = _place(data, rng)
    part = data[at : at + rng.choice((1, 8, 64, rng.randrange(1, 2000)))]
    data[at:at] = part * rng.choice((1, 1, 2, 30))
    return bytes(data)


def _insert(data: bytearray, rng: Rng) -> bytes:
    at = _place(data, rng)
    data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))
    return bytes(data)


def _write_number(data: bytearray, rng: Rng) -> bytes:
    size = rng.choice((2, 4, 8))
    at = _place(data, rng)
    if rng.random() < 0.5:
        at -= at % 4
    value = (rng.choice(INTEGERS) - rng.choice((0, 0, 0, 1))) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, "little")
    return bytes(data)


def _fill(data: bytearray, rng: Rng) -> bytes:
    at, size = _place(data, rng), rng.choice((4, 32, 512))
    data[at : at + size] = bytes([rng.choice((0, 0xFF, 0x7F))]) * len(data[at : at + size])
    return bytes(data)


def _append(data: bytearray, rng: Rng) -> bytes:
    return bytes(data) + rng.randbytes(rng.choice((1, 32, 4096)))


def _nothing(_data: bytearray, rng: Rng) -> bytes:
    return rng.choice((b"", b"\0", b"\n", rng.randbytes(rng.randrange(200))))


_BYTE_CHANGES: tuple[Callable[[bytearray, Rng], bytes], ...] = (
    _flip, _flip, _flip, _set, _set, _cut, _delete, _repeat, _insert, _write_number, _write_number,
    _fill, _append,
) * 4 + (_nothing,)  # fmt: skip


def spoil_json(data: bytes, rng: Rng) -> bytes:
    """A change of one value, key or nesting of a JSON text; of the text itself now and then."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return spoil_bytes(data, rng)
    if rng.random() < 0.1:
        return _spoil_json_text(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = spoil_value(value, rng)
    return _dumped(value, rng)


def _dumped(value: Any, rng: Rng) -> bytes:
    ascii_only = rng.random() < 0.8
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def _spoil_json_text(data: bytes, rng: Rng) -> bytes:
    text = data.strip()
    return rng.choice(
        (
            b"\xef\xbb\xbf" + text,
            text.replace(b":", b': 1e999, "x":', 1),
            b"[" * 100_000 + text,
            b'{"a":' * 5_000 + text + b"}" * 5_000,
            text[:-1] + b"," + text[1:],
            text.replace(b"1", b"9" * 5_000, 1),
            text.replace(b'"', b"'"),
            text + text,
            text.decode("utf-8", "replace").encode("utf-16"),
        )
    )


def spoil_value(value: Any, rng: Rng) -> Any:
    """A JSON value with one change somewhere inside it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        return _spoil_entry(dict(value), key, rng)
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        changed = list(value)
        match rng.randrange(6):
            case 0:
                del changed[at]
            case 1:
                changed[at:at] = [changed[at]] * rng.choice((1, 3, 1000))
            case 2:
                rng.shuffle(changed)
            case _:
                changed[at] = spoil_value(changed[at], rng)
        return changed
    if isinstance(value, str) and value[:1] in "{[" and rng.random() < 0.9:
        try:  # JSON inside a string, as in the metadata of safetensors and GGUF
            return _dumped(spoil_value(json.loads(value), rng), rng).decode("utf-8", "replace")
        except (ValueError, RecursionError):
            pass
    return _another(value, rng)


def _spoil_entry(value: dict[str, Any], key: str, rng: Rng) -> dict[str, Any]:
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1:
            value[key + rng.choice(("x", "\ud800", "é", " "))] = value.pop(key)
        case 2:
            value[rng.choice(_TEXTS)] = _another(None, rng)
        case 3:
            value[key] = value[rng.choice(list(value))]
        case _:
            value[key] = spoil_value(value[key], rng)
    return value


def _another(value: Any, rng: Rng) -> Any:
    if isinstance(value, int | float) and rng.random() < 0.6:
        near = (value + 1, value - 1, -value, value * 2, str(value), [value])
        return rng.choice((*near, *_NUMBERS))
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        near = (value[:at], value[at:], value * 3, value.upper(), value + "\0", [value])
        return rng.choice((*near, value[:at] + rng.choice(_TEXTS) + value[at:]))
    return rng.choice((*_OTHERS, *_NUMBERS, *_TEXTS))


def spoil_safetensors(data: bytes, rng: Rng) -> bytes:
    """A change of the header, whose length stays right (mostly), or of the numbers after it."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    match rng.randrange(8):
        case 0 | 1 | 2 | 3 | 4:
            header = spoil_json(header, rng)
        case 5:
            rest = _spoil_floats(rest, rng)
        case 6:
            rest = spoil_bytes(rest, rng)
        case _:
            size = (size + rng.choice((-1, 1, 8, *INTEGERS))) % (1 << 64)
            return size.to_bytes(8, "little") + header + rest
    return len(header).to_bytes(8, "little") + header + rest


def _spoil_floats(data: bytes, rng: Rng) -> bytes:
    """NaN, infinity, huge and tiny numbers, of two or four bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 4, 64))):
        pattern = rng.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x7c",
             b"\x01\x7c", b"\xff\x7b", b"\x01\x00\x00\x00", b"\xff\xff\xff\xff")
        )  # fmt: skip
        at = rng.randrange(max(1, len(changed) // len(pattern))) * len(pattern)
        changed[at : at + len(pattern)] = pattern
    return bytes(changed[: len(data)])


def spoil_lines(data: bytes, rng: Rng) -> bytes:
    """A change of one line of JSON lines or CSV, or of the order and the ends of lines."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(9):
        case 0:
            lines[at : at + 1] = [lines[at]] * rng.choice((0, 2, 300))
        case 1:
            rng.shuffle(lines)
        case 2:
            return rng.choice((b"\r\n", b"\r", b"\n\n", b"\0\n", b"\xe2\x80\xa8")).join(lines)
        case 3:
            odd = (b'"', b"'", b",", b";", b"\t", b"\0", b"\\", b"\xff", b'""', b"\xed\xa0\x80")
            cut = rng.randrange(len(lines[at]) + 1)
            more = rng.choice(odd) * rng.choice((1, 2, 999))
            lines[at] = lines[at][:cut] + more + lines[at][cut:]
        case 4:
            lines[at] = lines[at] * rng.choice((2, 500))
        case 5:
            lines[at] = spoil_bytes(lines[at], rng)
        case _:
            lines[at] = spoil_json(lines[at], rng)
    return b"\n".join(lines)
