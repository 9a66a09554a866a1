"""Safetensors: by hand, against the library, and every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgelora.adapters.safetensors_file import open_safetensors, save_safetensors
from edgelora.errors import InvalidFile


def write(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def problems_of(path: Path) -> str:
    with pytest.raises(InvalidFile) as caught:
        open_safetensors(path)
    return str(caught.value)


def test_three_types_by_hand(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "half": entry("F16", [2], 0, 4),
        "brain": entry("BF16", [1, 2], 4, 8),
        "single": entry("F32", [1], 8, 12),
    }
    data = bytes.fromhex("003c00c0803f40c00000a040")  # 1, -2; 1, -3; 5
    file = open_safetensors(write(tmp_path / "a.safetensors", header, data))
    assert file.array("half").tolist() == [1.0, -2.0]
    assert file.array("brain").tolist() == [[1.0, -3.0]]
    assert file.array("brain").dtype == np.float32
    assert file.array("single").tolist() == [5.0]


@pytest.mark.parametrize("size", [640, 0x3C20, 0x3C09, 60])
def test_a_header_whose_length_looks_like_text(size: int, tmp_path: Path) -> None:
    """640 begins like a pickle, 0x3C20 like ` <`, the start of a web page."""
    header = json.dumps({} if size < 100 else {"a": entry("F32", [1], 0, 4)}).encode()
    data = b"" if size < 100 else bytes(4)
    file = open_safetensors(write(tmp_path / "a.safetensors", header.ljust(size), data))
    assert list(file.tensors) == ([] if size < 100 else ["a"])


def test_agrees_with_the_library_both_ways(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "b": rng.standard_normal((3, 5), dtype=np.float32),
        "a": rng.standard_normal((4, 2)).astype(np.float16),
        "turned": rng.standard_normal((2, 7), dtype=np.float32).T,
    }
    save_safetensors(tmp_path / "ours", arrays, {"format": "pt"})
    theirs = load_file(tmp_path / "ours")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tmp_path / "theirs")
    ours = open_safetensors(tmp_path / "theirs")
    for name, values in arrays.items():
        assert np.array_equal(theirs[name], values)
        assert np.array_equal(ours.array(name), values)
        assert ours.array(name).dtype == values.dtype


def test_impostors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 161000000\n")
    assert "Git LFS pointer" in problems_of(path)
    path.write_bytes(b"<!DOCTYPE html><html>")
    assert "web page" in problems_of(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "pickle" in problems_of(path)
    for content in (b"", b"1234567", (1 << 60).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        assert "truncated or not a safetensors file" in problems_of(path)


def test_a_header_that_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"w": entry("F32", [4], 0, 16)}, bytes(15))
    assert "truncated: the header promises" in problems_of(path)
    path = write(tmp_path / "a", {"w": entry("F32", [4], 0, 16)}, bytes(17))
    assert "longer than its tensors" in problems_of(path)


def test_every_bad_entry_is_listed(tmp_path: Path) -> None:
    header = {
        "size": entry("F32", [4], 0, 12),
        "type": entry("F31", [4], 0, 12),
        "shape": entry("F32", [-1], 0, 4),
        "backwards": entry("F32", [1], 8, 4),
        "missing": {"dtype": "F32"},
        "nothing": None,
    }
    text = problems_of(write(tmp_path / "a", header, bytes(16)))
    assert all(f"{name}:" in text for name in header)


def test_gaps_and_overlaps(tmp_path: Path) -> None:
    overlap = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}
    assert "b: starts at" in problems_of(write(tmp_path / "a", overlap, bytes(12)))
    gap = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}
    assert "b: starts at" in problems_of(write(tmp_path / "a", gap, bytes(12)))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{" * 4000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a":{},"a":{}}', "twice"),
    ],
)
def test_bad_json(header: bytes, words: str, tmp_path: Path) -> None:
    assert words in problems_of(write(tmp_path / "a", header))
