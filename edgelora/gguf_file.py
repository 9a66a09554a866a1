"""A checked, memory-mapped reader of GGUF files: nothing in a file is believed unchecked.

The rules are those of ggml's own reader (ggml/src/gguf.cpp), whose failures end the process:
tensors lie one after the other, each padded to the alignment, and names have at most 63 bytes.
Not covered: big-endian files, GGUF v1, files that are changed or cut while they are open.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import NDArray

from edgelora.errors import EdgeLoRAError, InvalidFile, NotFound, UnsupportedFile

MAX_HEADER_BYTES = 256 << 20  # 256k tokens, scores and merges take 15 MB
MAX_STRING_BYTES = 16 << 20
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 63  # GGML_MAX_NAME counts the closing zero
MAX_PROBLEMS = 20

_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h", GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q", GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d", GGUFValueType.BOOL: "<?",
}  # fmt: skip
_VALUE_TYPES = {int(kind): kind for kind in GGUFValueType}
_TENSOR_TYPES = {int(kind): kind for kind in GGMLQuantizationType}
_PLAIN = {
    GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2",
    GGMLQuantizationType.F64: "<f8", GGMLQuantizationType.I8: "i1",
    GGMLQuantizationType.I16: "<i2", GGMLQuantizationType.I32: "<i4",
    GGMLQuantizationType.I64: "<i8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        shape: numpy order, (out, in) for a matrix.
        offset: of its first byte, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class _Entry:
    """One key and value: where it lies in the header, and its value unless it is an array."""

    start: int
    end: int
    kind: GGUFValueType
    item_kind: GGUFValueType | None = None
    count: int = 0
    items: int = 0
    value: object = None


# One object for equal shapes: the files of a bank have the same ones thousands of times.
_shape = functools.lru_cache(maxsize=1024)(lambda dims: tuple(reversed(dims)))


class Metadata(Mapping[str, Any]):
    """Keys to Python scalars and strings; arrays are decoded at each access (list of str, ndarray).

    Text that is not UTF-8 is decoded with replacement characters.
    """

    def __init__(self, data: NDArray[np.uint8], entries: dict[str, _Entry]) -> None:
        self._data = data
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        entry = self._entries[key]
        if entry.item_kind is None:
            return entry.value
        if entry.item_kind is GGUFValueType.STRING:
            return [text.decode("utf-8", errors="replace") for text in self.raw_strings(key)]
        raw = self._data[entry.items : entry.end]
        return np.frombuffer(raw.tobytes(), dtype=np.dtype(_SCALARS[entry.item_kind]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def value_type(self, key: str) -> GGUFValueType:
        """The type that the file gives this key (ARRAY for arrays)."""
        return self._entries[key].kind

    def scalars(self) -> dict[str, Any]:
        """Every entry but the arrays, in file order."""
        return {key: entry.value for key, entry in self._entries.items() if not entry.item_kind}

    def raw_strings(self, key: str) -> list[bytes]:
        """The bytes of each text of an array, whatever they encode.

        Raises:
            KeyError: no such entry.
            TypeError: it is no array of texts.
        """
        entry = self._entries[key]
        if entry.item_kind is not GGUFValueType.STRING:
            raise TypeError(f"{key} is not an array of texts")
        raw = self._data[entry.items : entry.end].tobytes()
        strings = []
        at = 0
        for _ in range(entry.count):
            (length,) = struct.unpack_from("<Q", raw, at)
            strings.append(raw[at + 8 : at + 8 + length])
            at += 8 + length
        return strings


class GGUFFile:
    """An open GGUF: metadata and tensors, all checked to lie inside the file."""

    def __init__(
        self,
        path: Path,
        data: NDArray[np.uint8],
        entries: dict[str, _Entry],
        tensors: dict[str, TensorInfo],
    ) -> None:
        self.path = path
        self.metadata = Metadata(data, entries)
        self.tensors = tensors
        self._data = data
        self._entries = entries

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, uint8 (size_bytes,), memory-mapped and read-only."""
        info = self.tensors[name]
        return self._data[info.offset : info.offset + info.size_bytes]

    def array(self, name: str) -> NDArray[Any]:
        """A tensor in numpy's shape order.

        F32, F16, F64 and integers are read-only views of the file; BF16 and the quantised types
        become a new float32 array.

        Raises:
            UnsupportedFile: a type that gguf cannot dequantise.
        """
        info = self.tensors[name]
        plain = _PLAIN.get(info.ggml_type)
        if plain is not None:
            return self.raw(name).view(plain).reshape(info.shape)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # a block's scale may be infinite
                return dequantize(self.raw(name), info.ggml_type).reshape(info.shape)
        except NotImplementedError as error:
            raise UnsupportedFile(
                f"{self.path}: {name} has type {info.ggml_type.name}, which cannot be read"
            ) from error

    def metadata_bytes(self, prefix: str) -> Iterator[bytes]:
        """The raw bytes (key, type, value) of each entry whose key starts with `prefix`.

        In the order of the keys, so that a hash does not depend on the writer's order.
        """
        for key in sorted(self._entries):
            if key.startswith(prefix):
                entry = self._entries[key]
                yield self._data[entry.start : entry.end].tobytes()


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file of version 2 or 3, reading its header only.

    Raises:
        NotFound: there is no such file.
        InvalidFile: it is damaged, truncated or not a GGUF; every problem is listed.
    """
    data = _map(path)
    _check_magic(path, data)
    header = _Header(path, data)
    try:
        return header.read()
    except (struct.error, OverflowError) as error:
        raise header.truncated() from error


def _map(path: Path) -> NDArray[np.uint8]:
    if not path.exists():
        raise NotFound(f"{path}: no such file")
    try:
        if path.stat().st_size == 0:
            raise InvalidFile(f"{path}: the file is empty")
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be opened ({error.strerror})") from error


def _check_magic(path: Path, data: NDArray[np.uint8]) -> None:
    start = data[:8].tobytes()
    if start.startswith(b"version "):
        raise InvalidFile(
            f"{path}: a Git LFS pointer, not the file itself",
            hint="Fetch the file with `git lfs pull`, then try again.",
        )
    if start[:4] != b"GGUF":
        raise InvalidFile(f"{path}: not a GGUF file (it starts with {start[:4]!r})")
    version = int.from_bytes(start[4:8], "little")
    if len(start) == 8 and version not in (2, 3):
        big_endian = int.from_bytes(start[4:8], "big") in (2, 3)
        what = "is big-endian" if big_endian else f"has GGUF version {version}"
        raise InvalidFile(f"{path}: {what}; versions 2 and 3, little-endian, can be read")


class _Header:
    """A cursor over the header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.data = data
        self.view = data.data[:MAX_HEADER_BYTES]
        self.at = 8

    def read(self) -> GGUFFile:
        n_tensors, n_entries = self.unpack("<QQ")
        if n_tensors > MAX_TENSORS or n_entries > MAX_ENTRIES:
            raise self.error(f"claims {n_tensors} tensors and {n_entries} metadata entries")
        entries = self.entries(n_entries)
        infos = [self.tensor() for _ in range(n_tensors)]
        alignment = _alignment(self, entries)
        start = -(-self.at // alignment) * alignment
        problems, tensors = _place(infos, start, alignment, self.data.size)
        if problems:
            raise InvalidFile(
                f"{self.path}: the tensors do not fit the file", problems=_shorten(problems)
            )
        return GGUFFile(self.path, self.data, entries, tensors)

    def entries(self, count: int) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for _ in range(count):
            start = self.at
            key = self.name("key")
            if key in entries:
                raise self.error(f"the key {key!r} comes twice")
            entries[key] = self.entry(start, key)
        return entries

    def entry(self, start: int, key: str) -> _Entry:
        kind = self.value_kind(key)
        if kind is GGUFValueType.STRING:
            text = self.string().decode("utf-8", errors="replace")
            return _Entry(start, self.at, kind, value=text)
        if kind is not GGUFValueType.ARRAY:
            (value,) = self.unpack(_SCALARS[kind])
            return _Entry(start, self.at, kind, value=value)
        item_kind = self.value_kind(key)
        (count,) = self.unpack("<Q")
        items = self.at
        if item_kind is GGUFValueType.ARRAY:
            raise self.error(f"{key!r} is an array of arrays")
        if item_kind is GGUFValueType.STRING:
            self.skip_strings(count, key)
        else:
            self.skip(count * struct.calcsize(_SCALARS[item_kind]))
        return _Entry(start, self.at, kind, item_kind, count, items)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = sys.intern(self.name("tensor name"))
        (n_dims,) = self.unpack("<I")
        if not 1 <= n_dims <= 4:
            raise self.error(f"the tensor {name!r} has {n_dims} dimensions")
        dims = self.unpack(f"<{n_dims}Q")
        kind, offset = self.unpack("<IQ")
        return name, _shape(dims), kind, offset

    def value_kind(self, key: str) -> GGUFValueType:
        (kind,) = self.unpack("<I")
        if kind not in _VALUE_TYPES:
            raise self.error(f"{key!r} has the unknown value type {kind}")
        return _VALUE_TYPES[kind]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.view, self.at)
        self.at += struct.calcsize(layout)
        return values

    def skip(self, size: int) -> None:
        if size > len(self.view) - self.at:
            raise self.truncated()
        self.at += size

    def string(self) -> bytes:
        (length,) = self.unpack("<Q")
        if length > MAX_STRING_BYTES:
            raise self.error(f"a string claims {length} bytes")
        start = self.at
        self.skip(length)
        return bytes(self.view[start : self.at])

    def name(self, what: str) -> str:
        raw = self.string()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a {what} is not UTF-8: {raw[:40]!r}") from error

    def skip_strings(self, count: int, key: str) -> None:
        if count > (len(self.view) - self.at) // 8:
            raise self.error(f"{key!r} claims {count} strings, more than the file can hold")
        at, view, end = self.at, self.view, len(self.view)
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + unpack(view, at)[0]
            if at > end:
                raise self.truncated()
        self.at = at

    def error(self, what: str) -> EdgeLoRAError:
        return InvalidFile(f"{self.path}: {what} (at byte {self.at} of the header)")

    def truncated(self) -> EdgeLoRAError:
        if len(self.view) < self.data.size:
            return self.error(f"the header is longer than {MAX_HEADER_BYTES >> 20} MiB")
        return self.error(f"the header goes on past the file's {self.data.size} bytes: truncated")


def _alignment(header: _Header, entries: dict[str, _Entry]) -> int:
    entry = entries.get("general.alignment")
    if entry is None:
        return 32
    value = entry.value
    if entry.kind is not GGUFValueType.UINT32 or not isinstance(value, int):
        raise header.error("general.alignment is not an uint32")
    if value == 0 or value & (value - 1) or value > 1 << 20:
        raise header.error(f"general.alignment is {value}, not a power of two")
    return value


def _place(
    infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, file_size: int
) -> tuple[list[str], dict[str, TensorInfo]]:
    """Check that the tensors follow each other inside the file; problems and absolute places."""
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, shape, kind, offset in infos:
        size, problem = _size(name, shape, kind)
        if name in tensors:
            problem = problem or "comes twice"
        if not problem and offset != expected:
            problem = f"has offset {offset}, expected {expected}: tensors overlap or leave a gap"
        if not problem and start + offset + size > file_size:
            problem = f"ends at byte {start + offset + size}, the file has {file_size}: truncated"
        if problem:
            problems.append(f"{name}: {problem}")
            if not size:
                break  # no later offset can be judged
        expected = offset + -(-size // alignment) * alignment
        ggml_type = _TENSOR_TYPES.get(kind, GGMLQuantizationType.F32)
        tensors[name] = TensorInfo(name, shape, ggml_type, start + offset, size)
    return problems, tensors


def _size(name: str, shape: tuple[int, ...], kind: int) -> tuple[int, str]:
    """The size in bytes, or 0 and why it has none."""
    if kind not in _TENSOR_TYPES:
        return 0, f"has the unknown type {kind}"
    block_size, type_size = GGML_QUANT_SIZES[_TENSOR_TYPES[kind]]
    n_elements = math.prod(shape)
    if min(shape) < 1 or n_elements >= 1 << 62:
        return 0, f"has the impossible shape {shape}"
    if shape[-1] % block_size:
        return 0, f"has rows of {shape[-1]}, not a multiple of {block_size}"
    size = n_elements // block_size * type_size
    if len(name.encode()) > MAX_NAME_BYTES:
        return size, f"the name is longer than {MAX_NAME_BYTES} bytes"
    return size, ""


def _shorten(problems: list[str]) -> list[str]:
    if len(problems) <= MAX_PROBLEMS:
        return problems
    return [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more"]
