"""GGUF LoRA files: streamed writing, memory-mapped reading, and the check against a base.

The layout is llama.cpp's: `<base tensor>.lora_a` (r, in) and `.lora_b` (out, r), one alpha a file,
scale alpha / r at run time, or 1 where alpha is 0.
Not covered: activated LoRA (aLoRA) and trained norms, both refused by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray

from edgelora.adapters.lora import LoraPair
from edgelora.adapters.lora_layout import (
    ALPHA_KEY,
    DTYPES,
    EMBEDDING,
    Q8_0_BLOCK,
    AdapterRecord,
    PairPlan,
    Scalar,
    file_shapes,
    read_plan,
    read_record,
    refuse_types,
)
from edgelora.errors import EdgeLoRAError, InvalidFile, UnsupportedFile
from edgelora.files import allow_open_files, sha256_of
from edgelora.gguf_file import GGUFFile, open_gguf

if TYPE_CHECKING:
    from edgelora.adapters.base import Base

__all__ = [
    "AdapterRecord",
    "LoraFile",
    "PairPlan",
    "Scalar",
    "check",
    "find_nonfinite",
    "is_finite",
    "open_lora",
    "write_lora",
]


@dataclass(frozen=True)
class LoraFile:
    """An open GGUF LoRA, checked; values are read from the mapped file when asked for."""

    gguf: GGUFFile
    record: AdapterRecord
    plan: Mapping[str, PairPlan]

    @property
    def path(self) -> Path:
        """The file."""
        return self.gguf.path

    @property
    def names(self) -> tuple[str, ...]:
        """The base tensors that are updated, in file order."""
        return tuple(self.plan)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each update, by the name of its tensor."""
        return {name: planned.rank for name, planned in self.plan.items()}

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.record.architecture

    @property
    def alpha(self) -> float:
        """The file's one alpha; 0 means scale 1."""
        return self.record.alpha

    @property
    def metadata(self) -> dict[str, Scalar]:
        """Scalars and strings by their full key."""
        return self.record.metadata

    @functools.cached_property
    def sha256(self) -> str:
        """The hex SHA-256 of the whole file."""
        return sha256_of(self.path)

    def rank(self, name: str) -> int:
        """The rank of the update of one base tensor."""
        return self.plan[name].rank

    def pair(self, name: str) -> LoraPair:
        """The update of one base tensor; F32 and F16 factors are read-only views of the file."""
        first = self.gguf.array(f"{name}.lora_a")
        second = self.gguf.array(f"{name}.lora_b")
        lora_a, lora_b = (second.T, first) if name == EMBEDDING else (first, second)
        scale = self.alpha / self.rank(name) if self.alpha else 1.0
        return LoraPair(name, lora_a, lora_b, scale)

    def pairs(self) -> Iterator[LoraPair]:
        """Every update, one alive at a time."""
        return (self.pair(name) for name in self.names)


def write_lora(
    path: Path,
    plan: Sequence[PairPlan],
    pairs: Iterable[LoraPair],
    *,
    architecture: str,
    alpha: float | None,
    dtype: str = "f16",
    metadata: Mapping[str, Scalar] | None = None,
) -> AdapterRecord:
    """Stream pairs into a GGUF LoRA and read the file back; the same input gives the same bytes.

    Args:
        path: a temporary path (see files.publish).
        plan: names and sizes, in the order in which `pairs` come.
        alpha: None bakes every scale into lora_b in float32 and writes alpha 0. A number leaves
            the factors as they are; every pair's scale must then be alpha / rank.
        dtype: f16, f32, bf16 or q8_0 (rank and width multiples of 32).
        metadata: written in this order; keys start with `edgelora.` or `general.`.

    Raises:
        UnsupportedFile: q8_0 and a rank or width that is not a multiple of 32.
        InvalidFile: a factor holds NaN or infinite values.
        EdgeLoRAError: a value is too large for the dtype.
        OSError: the disk is full.
        ValueError: pairs and plan differ, or scales and alpha (a bug of the caller).
    """
    _refuse_plan(plan, dtype)
    writer = _describe(plan, architecture, alpha, dtype, metadata or {})
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for planned, pair in zip(plan, pairs, strict=True):
            for array in _factors(planned, pair, alpha):
                _write_array(writer, _encode(planned.name, array, dtype))
    finally:
        writer.close()
    written = open_lora(path)
    if list(written.plan.values()) != list(plan):
        raise InvalidFile(f"{path}: reads back with other tensors than were written")
    return written.record


def open_lora(path: Path) -> LoraFile:
    """Open a GGUF LoRA.

    Raises:
        NotFound, InvalidFile: not a sound GGUF, or not a LoRA; every problem is listed.
        UnsupportedFile: an activated LoRA, or factors of a type that cannot be read.
    """
    gguf = open_gguf(path)
    record = read_record(gguf)
    plan, problems = read_plan(gguf.tensors)
    if problems:
        raise InvalidFile(f"{path}: not a sound GGUF LoRA", problems=problems[:20])
    refuse_types(gguf)
    return LoraFile(gguf, record, plan)


def open_loras(paths: Sequence[Path]) -> list[LoraFile]:
    """Open any number of GGUF LoRAs at once, as `open_lora` does each."""
    allow_open_files(len(paths))
    return [open_lora(path) for path in paths]


def check(lora: LoraFile, base: Base) -> list[str]:
    """Every reason why this adapter must not reach llama.cpp with this base, or []."""
    problems = []
    if lora.architecture != base.architecture:
        problems.append(f"made for {lora.architecture}, the base is {base.architecture}")
    recorded = lora.metadata.get("edgelora.base.id")
    if recorded is not None and recorded != base.identity.id:
        problems.append(
            f"made for base {_identity(lora)}, this base is {base.identity.id} "
            f"({base.identity.describe()})"
        )
    for planned in lora.plan.values():
        problems.extend(_misfits(planned, base))
    return problems


def find_nonfinite(lora: LoraFile) -> list[str]:
    """The tensors that hold NaN or infinite values."""
    return [
        f"{name}: holds NaN or infinite values"
        for name in lora.gguf.tensors
        if not is_finite(lora.gguf.array(name))
    ]


def is_finite(array: NDArray[Any]) -> bool:
    """Whether every value is finite (float16 through its bits, ten times faster)."""
    if array.dtype == np.float16:
        return not bool(((array.view(np.uint16) & 0x7C00) == 0x7C00).any())
    return bool(np.isfinite(array).all())


def _identity(lora: LoraFile) -> str:
    parts = [
        f"{part} {lora.metadata[f'edgelora.base.{part}']}"
        for part in ("architecture", "shapes", "tokenizer", "norms")
        if f"edgelora.base.{part}" in lora.metadata
    ]
    return f"{lora.metadata['edgelora.base.id']} ({', '.join(parts) or 'no details recorded'})"


def _misfits(planned: PairPlan, base: Base) -> list[str]:
    shape = base.shapes.get(planned.name)
    if shape is None:
        return [f"{planned.name}: the base has no such tensor"]
    if shape != (planned.n_out, planned.n_in):
        sizes = " x ".join(map(str, shape))
        return [f"{planned.name}: updates {planned.n_out} x {planned.n_in}, the base has {sizes}"]
    if planned.name == EMBEDDING and not base.has_output:
        return [f"{planned.name}: the base ties it to its output; llama.cpp would crash"]
    if planned.name == "position_embd.weight":
        return [f"{planned.name}: llama.cpp does not apply a LoRA to it"]
    return []


def _refuse_plan(plan: Sequence[PairPlan], dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if not plan:
        raise InvalidFile("an adapter without any tensor")
    if dtype != "q8_0":
        return
    bad = [p for p in plan if any(shape[1] % Q8_0_BLOCK for shape in file_shapes(p))]
    if bad:
        raise UnsupportedFile(
            f"q8_0 needs ranks and widths that are multiples of {Q8_0_BLOCK}",
            problems=[f"{p.name}: rank {p.rank}, {p.n_in} wide" for p in bad[:20]],
            hint="Choose f16, which any rank permits.",
        )


def _describe(
    plan: Sequence[PairPlan],
    architecture: str,
    alpha: float | None,
    dtype: str,
    metadata: Mapping[str, Scalar],
) -> GGUFWriter:
    """A writer that knows its metadata and its tensors; nothing is on disk yet."""
    writer = GGUFWriter(None, architecture)
    writer.add_key_value("general.type", "adapter", GGUFValueType.STRING)
    writer.add_key_value("adapter.type", "lora", GGUFValueType.STRING)
    writer.add_key_value(ALPHA_KEY, float(alpha or 0.0), GGUFValueType.FLOAT32)
    for key, value in metadata.items():
        if not key.startswith(("edgelora.", "general.")):
            raise ValueError(f"the metadata key {key!r} belongs to llama.cpp")
        writer.add_key_value(key, value, _value_type(value))
    kind = DTYPES[dtype]
    for planned in plan:
        for suffix, shape in zip(("lora_a", "lora_b"), file_shapes(planned), strict=True):
            _add_tensor(writer, f"{planned.name}.{suffix}", shape, kind)
    return writer


def _write_array(writer: GGUFWriter, array: NDArray[Any]) -> None:
    """GGUFWriter.write_tensor_data, whose `tofile` says nothing when the disk is full."""
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    file.write(array.data)
    writer.write_padding(file, array.nbytes)


def _add_tensor(
    writer: GGUFWriter, name: str, shape: tuple[int, int], kind: GGMLQuantizationType
) -> None:
    n_values = shape[0] * shape[1]
    sizes = {"F32": 4 * n_values, "F16": 2 * n_values, "BF16": 2 * n_values}
    size = sizes.get(kind.name, n_values // Q8_0_BLOCK * 34)
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _value_type(value: Scalar) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT32 if 0 <= value < 1 << 32 else GGUFValueType.INT64
    return GGUFValueType.FLOAT64 if isinstance(value, float) else GGUFValueType.STRING


def _factors(
    planned: PairPlan, pair: LoraPair, alpha: float | None
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The two arrays in the file's order, scale baked in where alpha is None."""
    lora_a, lora_b = pair.lora_a, pair.lora_b
    found = PairPlan(pair.name, lora_a.shape[0], lora_a.shape[1], lora_b.shape[0])
    if found != planned or lora_b.shape[1] != planned.rank:
        raise ValueError(f"planned {planned}, got {found}")
    if alpha is None:
        with np.errstate(over="ignore"):  # an infinity is refused where it is encoded
            lora_b = lora_b.astype(np.float32) * np.float32(pair.scale)
    elif not math.isclose(pair.scale, alpha / pair.rank, rel_tol=1e-6):
        raise ValueError(f"{pair.name}: scale {pair.scale} is not {alpha} / {pair.rank}")
    return (lora_b, lora_a.T) if planned.name == EMBEDDING else (lora_a, lora_b)


def _encode(name: str, array: NDArray[np.floating], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        encoded: NDArray[Any]
        if dtype == "f16":
            checked = encoded = np.ascontiguousarray(array, dtype="<f2")
        elif dtype == "f32":
            checked = encoded = np.ascontiguousarray(array, dtype="<f4")
        else:
            encoded = quantize(np.ascontiguousarray(array, dtype=np.float32), DTYPES[dtype])
            checked = _dequantised_extremes(encoded, dtype)
    if is_finite(checked) and (checked is encoded or is_finite(array)):
        return encoded
    if not is_finite(array):
        raise InvalidFile(f"{name}: holds NaN or infinite values")
    raise EdgeLoRAError(
        f"{name}: has values too large for {dtype}", hint="Choose f32 as the output type."
    )


def _dequantised_extremes(encoded: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Values that are infinite exactly where the encoding overflowed."""
    if dtype == "bf16":
        return (encoded.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(encoded.reshape(-1, 34)[:, :2]).view(np.float16)
