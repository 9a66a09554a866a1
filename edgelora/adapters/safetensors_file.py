"""A checked, memory-mapped reader of safetensors files (hostile until checked), and a writer.

The library's numpy reader cannot read BF16, and says little about a damaged file. Not covered:
sharded files with an index, and types other than F32, F16 and BF16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import InvalidFile

ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
OTHER_TYPES = frozenset(
    "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F4 F6_E2M3 F6_E3M2 I16 U16 I32 U32 F64 I64 U64 C64".split()
)
MAX_HEADER_BYTES = 100_000_000
LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its type, its shape, and its bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class SafetensorsFile:
    """An open safetensors file whose header has been checked."""

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]) -> None:
        self.path = path
        self.tensors: Mapping[str, StoredTensor] = tensors
        self._bytes: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")

    def array(self, name: str) -> NDArray[np.floating]:
        """One tensor: a memory-mapped view (float32, float16), or float32 made from BF16."""
        tensor = self.tensors[name]
        raw = self._bytes[tensor.offset : tensor.offset + tensor.size_bytes]
        if tensor.dtype == "BF16":
            # A BF16 number is the upper half of a float32.
            wide = raw.view("<u2").astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(tensor.shape)
        return raw.view("<f4" if tensor.dtype == "F32" else "<f2").reshape(tensor.shape)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Check the header of a safetensors file and map its data.

    Raises:
        InvalidFile: every problem of the header: a Git LFS pointer, a truncated file, overlapping
            or missing bytes, types and shapes that do not agree with the sizes.
    """
    try:
        with path.open("rb") as file:
            size_bytes = path.stat().st_size
            start = file.read(1024)
            header = start[8:] + file.read(max(0, _header_size(path, start, size_bytes) - 1016))
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be read ({error.strerror})") from error
    n_header = int.from_bytes(start[:8], "little")
    tensors, problems = _parse(header[:n_header], 8 + n_header, size_bytes)
    if problems:
        raise InvalidFile(
            f"{path}: not a sound safetensors file",
            problems=problems,
            hint="Download or save it again.",
        )
    return SafetensorsFile(path, tensors)


def save_safetensors(
    path: Path, arrays: Mapping[str, NDArray[np.floating]], metadata: Mapping[str, str]
) -> None:
    """Write float32 and float16 arrays, in the given order, to `path` (see files.publish)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        dtype = {4: "F32", 2: "F16"}[array.itemsize]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)


def _refuse_impostors(path: Path, start: bytes) -> None:
    if start.startswith(LFS_POINTER_START):
        raise InvalidFile(
            f"{path}: a Git LFS pointer, not the weights themselves",
            hint="Fetch the real file (git lfs pull), then try again.",
        )
    if start.lstrip()[:1] == b"<":
        raise InvalidFile(f"{path}: a web page, not a safetensors file", hint="Download it again.")
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise InvalidFile(
            f"{path}: a PyTorch pickle under a safetensors name, which is never loaded",
            hint="Save the adapter again with safe_serialization=True.",
        )


def _header_size(path: Path, start: bytes, size_bytes: int) -> int:
    n_header = int.from_bytes(start[:8], "little")
    if len(start) >= 8 and 2 <= n_header <= min(size_bytes - 8, MAX_HEADER_BYTES):
        return n_header
    # Only now: the bytes of a header's length may be any letters.
    _refuse_impostors(path, start)
    what = f"promises a header of {n_header} bytes" if len(start) >= 8 else "is too short"
    raise InvalidFile(
        f"{path}: truncated or not a safetensors file: it {what} and has {size_bytes} bytes",
        hint="Download or save it again.",
    )


def _parse(
    header: bytes, data_start: int, size_bytes: int
) -> tuple[dict[str, StoredTensor], list[str]]:
    problems: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            problems.append("the header names one thing twice")
        return dict(pairs)

    try:
        entries = json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return {}, ["the header is not JSON"]
    if not isinstance(entries, dict):
        return {}, ["the header is not a JSON object"]
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        tensor = _stored_tensor(name, entry, data_start, problems)
        if tensor is not None:
            tensors[name] = tensor
    if not problems:
        problems += _layout_problems(tensors, data_start, size_bytes)
    return tensors, problems


def _stored_tensor(
    name: str, entry: object, data_start: int, problems: list[str]
) -> StoredTensor | None:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        problems.append(f"{name}: its shape or its offsets are not lists of whole numbers")
        return None
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES.keys() | OTHER_TYPES:
        problems.append(f"{name}: unknown type {dtype!r}")
        return None
    begin, end = offsets
    size = math.prod(shape) * ITEM_SIZES.get(dtype, 0)
    if end < begin or (dtype in ITEM_SIZES and end - begin != size):
        problems.append(f"{name}: {dtype} of shape {shape} needs {size} bytes, has {end - begin}")
        return None
    return StoredTensor(dtype, tuple(shape), data_start + begin, end - begin)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def _layout_problems(
    tensors: Mapping[str, StoredTensor], data_start: int, size_bytes: int
) -> list[str]:
    problems = []
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[0])):
        if tensor.offset != end:
            problems.append(f"{name}: starts at byte {tensor.offset}, the one before ends at {end}")
        end = max(end, tensor.offset + tensor.size_bytes)
    if end != size_bytes:
        problem = "truncated" if end > size_bytes else "longer than its tensors"
        problems.append(f"{problem}: the header promises {end} bytes, the file has {size_bytes}")
    return problems
