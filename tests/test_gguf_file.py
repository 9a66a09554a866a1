"""The checked reader: a file by hand, gguf's own reader as reference, then hostile files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pico
import pytest

from edgelora.errors import EdgeLoRAError, InvalidFile, NotFound, UnsupportedFile
from edgelora.gguf_file import MAX_PROBLEMS, GGUFFile, open_gguf

UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
F32, F16, Q8_0, Q8_K = 0, 1, 8, 15


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", kind, offset)


def assemble(
    entries: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_entries)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


ENTRIES = [
    entry("general.architecture", STRING, text("llama")),
    entry("a.number", UINT32, struct.pack("<I", 7)),
    entry("a.flag", BOOL, b"\x01"),
    entry("a.empty", STRING, text("")),
    entry("words", ARRAY, struct.pack("<IQ", STRING, 2) + text("é") + text("two")),
    entry("sizes", ARRAY, struct.pack("<IQ", FLOAT32, 3) + struct.pack("<3f", 1, 2, 3)),
]
TENSORS = [info("x.weight", (3, 2), F32, 0), info("y.weight", (4,), F16, 32)]
DATA = struct.pack("<6f", *range(6)) + bytes(8) + struct.pack("<4e", 1, 2, 3, 4)
SOUND = assemble(ENTRIES, TENSORS, DATA)


def opened(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    return open_gguf(path)


def read_all(file: GGUFFile) -> None:
    for key in file.metadata:
        file.metadata[key]
    for name in file.tensors:
        file.array(name)
    list(file.metadata_bytes(""))


def test_a_file_by_hand(tmp_path: Path) -> None:
    file = opened(tmp_path, SOUND)
    assert dict(file.metadata.scalars()) == {
        "general.architecture": "llama", "a.number": 7, "a.flag": True, "a.empty": "",
    }  # fmt: skip
    assert file.metadata["words"] == ["é", "two"]
    np.testing.assert_array_equal(file.metadata["sizes"], np.float32([1, 2, 3]))
    assert file.metadata.value_type("words") is gguf.GGUFValueType.ARRAY
    assert file.tensors["x.weight"].shape == (2, 3)
    np.testing.assert_array_equal(file.array("x.weight"), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(file.array("y.weight"), np.float16([1, 2, 3, 4]))
    assert not file.array("y.weight").flags.writeable
    assert list(file.metadata_bytes("a.")) == [ENTRIES[3], ENTRIES[2], ENTRIES[1]]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_equal_to_ggufs_own_reader(tmp_path: Path, dtype: str) -> None:
    path = pico.write_base(tmp_path / "base.gguf", dtype=dtype)
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.array(tensor.name), values)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        value = ours.metadata[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()


def test_metadata_bytes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    first = list(opened(tmp_path, SOUND).metadata_bytes("a."))
    turned = assemble(ENTRIES[::-1], TENSORS, DATA)
    assert list(opened(tmp_path, turned).metadata_bytes("a.")) == first


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    for size in range(len(SOUND)):
        with pytest.raises(InvalidFile):
            opened(tmp_path, SOUND[:size])


def test_any_byte_changed_is_read_or_refused(tmp_path: Path) -> None:
    """No other exception, no crash, no allocation from a claimed size."""
    rng = np.random.default_rng(0)
    for at in range(len(SOUND) - len(DATA)):
        for value in (0xFF, int(rng.integers(255))):
            changed = SOUND[:at] + bytes([value]) + SOUND[at + 1 :]
            try:
                read_all(opened(tmp_path, changed))
            except EdgeLoRAError as error:
                assert "file.gguf" in str(error)


def huge(count: int) -> bytes:
    return struct.pack("<IQ", STRING, count)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"GG", "not a GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (assemble([], [], version=1), "version 1"),
        (assemble([], [], version=4), "version 4"),
        (assemble([], [], version=3 << 24), "big-endian"),
        (assemble([], [], counts=(1 << 63, 0)), "claims 9223372036854775808 tensors"),
        (assemble([], [], counts=(0, 1 << 40)), "metadata entries"),
        (assemble([ENTRIES[0]] * 2, []), "comes twice"),
        (assemble([entry(b"\xff\xfe", UINT32, bytes(4))], []), "not UTF-8"),
        (assemble([entry("k", 13, bytes(8))], []), "unknown value type 13"),
        (assemble([entry("k", STRING, struct.pack("<Q", 1 << 62))], []), "claims 46116860"),
        (assemble([entry("k", STRING, struct.pack("<Q", 5000))], []), "truncated"),
        (assemble([entry("k", ARRAY, huge(1 << 61))], []), "more than the file can hold"),
        (assemble([entry("k", ARRAY, struct.pack("<IQ", UINT32, 1 << 62))], []), "truncated"),
        (assemble([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1))], []), "array of arrays"),
        (assemble([entry("general.alignment", UINT32, bytes(4))], []), "not a power of two"),
        (assemble([entry("general.alignment", STRING, text("32"))], []), "not an uint32"),
        (assemble([], [info("t", (), F32, 0)]), "has 0 dimensions"),
        (assemble([], [info("t", (1,) * 5, F32, 0)]), "has 5 dimensions"),
        (assemble([], [info("t", (0, 4), F32, 0)]), "impossible shape"),
        (assemble([], [info("t", (1 << 40, 1 << 40), F32, 0)]), "impossible shape"),
        (assemble([], [info("t", (32,), 99, 0)]), "unknown type 99"),
        (assemble([], [info("t", (33,), Q8_0, 0)], bytes(64)), "not a multiple of 32"),
        (assemble([], [info("t" * 64, (8,), F32, 0)], bytes(32)), "longer than 63 bytes"),
        (assemble([], [info("t", (8,), F32, 32)], bytes(64)), "overlap or leave a gap"),
        (assemble([], [info("t", (8,), F32, 0)], bytes(31)), "truncated"),
        (assemble([], [info(n, (8,), F32, 0) for n in "ab"], bytes(64)), "expected 32"),
        (assemble([], [info("t", (8,), F32, 0)] * 2, bytes(64)), "comes twice"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InvalidFile, match=message):
        opened(tmp_path, data)


def test_every_bad_tensor_is_listed_up_to_a_limit(tmp_path: Path) -> None:
    tensors = [info(f"t{i}", (8,), F32, 7 + i) for i in range(MAX_PROBLEMS + 5)]
    with pytest.raises(InvalidFile) as caught:
        opened(tmp_path, assemble([], tensors, bytes(4096)))
    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert caught.value.problems[-1] == "and 5 more"


def test_a_type_that_cannot_be_dequantised(tmp_path: Path) -> None:
    file = opened(tmp_path, assemble([], [info("t", (256,), Q8_K, 0)], bytes(292)))
    with pytest.raises(UnsupportedFile, match="Q8_K"):
        file.array("t")


@pytest.mark.parametrize("make", [lambda p: p / "absent.gguf", lambda p: p])
def test_no_file_and_a_folder(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises((NotFound, InvalidFile)):
        open_gguf(make(tmp_path))
