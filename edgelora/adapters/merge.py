"""GGUF LoRA files into one GGUF LoRA that records where it came from."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora import __version__
from edgelora.adapters.combine import AUTO, Coefficients, Combination, TensorReport, combine
from edgelora.adapters.gguf_lora import AdapterRecord, LoraFile, Scalar, open_lora, write_lora
from edgelora.adapters.provenance import describe_coefficients
from edgelora.adapters.spool import open_spool
from edgelora.errors import EdgeLoRAError, IncompatibleAdapter
from edgelora.files import allow_open_files, publish

FORMAT_VERSION = 1
TOOL = f"edgelora {__version__}"
BASE_PREFIX = "edgelora.base."
EXCESS_TOLD = 1e-6


@dataclass(frozen=True)
class MergeReport:
    """What a merge made.

    Attributes:
        error: relative Frobenius error of the whole before rounding to the file's dtype.
        excess: a bound on how much of it the best adapter of these ranks would save.
        tensors: rank, norm and error of each tensor.
        cancelled: tensors left out because the exact combination is zero.
    """

    path: Path
    method: str
    error: float
    excess: float
    tensors: tuple[TensorReport, ...]
    cancelled: tuple[str, ...]
    warnings: tuple[str, ...]
    record: AdapterRecord

    @property
    def energy(self) -> float:
        """The share of the exact combination's squared norm that an svd kept."""
        return 1.0 - self.error**2

    @property
    def max_rank(self) -> int:
        """The largest rank of a tensor."""
        return max(report.rank for report in self.tensors)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Linear algebra on one thread.

    numpy and scipy bring a BLAS each; on small matrices their threads wait for each other (ten
    times slower on two busy cores), and the last bits would depend on their number.
    """
    from threadpoolctl import threadpool_limits

    importlib.import_module("scipy.linalg")  # a BLAS that is loaded later would not be limited
    with threadpool_limits(1, user_api="blas"):
        yield


@one_blas_thread()
def merge_adapters(
    sources: Sequence[Path | LoraFile],
    coefficients: Coefficients,
    out: Path,
    *,
    method: str = "svd",
    rank: int | str = AUTO,
    scale: float = 1.0,
    dtype: str = "f16",
    metadata: Mapping[str, Scalar] | None = None,
    provenance: Mapping[str, object] | None = None,
    force: bool = False,
    progress: Callable[[int], None] = lambda n_tensors: None,
) -> MergeReport:
    """Write `scale * sum_i coefficients[i] * sources[i]` as one adapter; out appears whole or not.

    The same sources, coefficients and options give the same bytes on one machine. The header holds
    the errors, so all tensors are combined before the first is written; what svd makes waits in a
    temporary file beside `out`, so that memory holds one tensor only.

    Args:
        coefficients, method, rank, scale: see combine.combine. A source with coefficient 0
            everywhere is dropped, from the provenance too, which holds those for each tensor
            rounded to float16 (see provenance.describe_coefficients).
        dtype: f16, f32, bf16, or q8_0 where every rank is a multiple of 32.
        metadata: `edgelora.*` entries that replace those derived from the sources.
        provenance: what the caller knows (distance, operator, seed, budget ...), JSON values; it
            joins what is recorded here in `edgelora.provenance`.
        force: overwrite `out`.
        progress: called with 1 after each tensor.

    Raises:
        IncompatibleAdapter: sources for different architectures or bases.
        AlreadyExists: `out` exists and `force` is false.
        EdgeLoRAError: see combine.combine and gguf_lora.write_lora.
    """
    files, coefficients = _drop_unused(_opened(sources), coefficients)
    _refuse_mixture(files)
    facts, warnings = _inherited(_by_weight(files, coefficients))
    facts["edgelora.created_by"] = TOOL
    facts |= metadata or {}
    with publish(out, force=force) as temporary, open_spool(out.parent) as kept:
        made = combine(
            method, files, coefficients, rank=rank, scale=scale, kept=kept, progress=progress
        )
        own = _provenance(files, coefficients, made, method, rank, scale, facts)
        if clash := sorted(set(own) & set(provenance or {})):
            raise ValueError(f"the provenance records {', '.join(clash)} already")
        facts["edgelora.provenance"] = json.dumps(own | dict(provenance or {}), ensure_ascii=False)
        record = write_lora(
            temporary,
            made.plan,
            made.pairs(),
            architecture=files[0].architecture,
            alpha=None,
            dtype=dtype,
            metadata=facts,
        )
    return MergeReport(
        out, method, made.error, made.excess, made.reports, made.cancelled, warnings, record
    )


def _opened(sources: Sequence[Path | LoraFile]) -> list[LoraFile]:
    allow_open_files(len(sources))
    return [source if isinstance(source, LoraFile) else open_lora(source) for source in sources]


def _drop_unused(
    files: Sequence[LoraFile], coefficients: Coefficients
) -> tuple[list[LoraFile], Coefficients]:
    """Without the sources whose coefficients are all zero."""
    rows = _rows(coefficients)
    if not files or any(len(row) != len(files) for row in rows):
        raise EdgeLoRAError(f"{len(files)} adapters need as many coefficients, one or more")
    used = [i for i in range(len(files)) if any(row[i].any() for row in rows)]
    if not used:
        raise EdgeLoRAError("every coefficient is zero", hint="Choose other coefficients.")
    kept = [files[i] for i in used]
    if not isinstance(coefficients, Mapping):
        return kept, [float(coefficients[i]) for i in used]
    names = {name for file in kept for name in file.plan}
    dropped = {name for file in files for name in file.plan} - names
    return kept, {
        name: np.asarray(row, np.float64)[used]
        for name, row in coefficients.items()
        if name not in dropped
    }


def _refuse_mixture(files: Sequence[LoraFile]) -> None:
    """Sources for two architectures or two recorded bases."""
    for what, values in (
        ("architectures", {file.architecture for file in files}),
        ("bases", {str(i) for file in files if (i := file.metadata.get("edgelora.base.id"))}),
    ):
        if len(values) > 1:
            raise IncompatibleAdapter(
                f"the adapters are for different {what}",
                problems=[f"{file.path}: {_made_for(file)}" for file in files],
                hint="Combine adapters that were converted for one base.",
            )


def _made_for(file: LoraFile) -> str:
    return f"{file.architecture}, base {file.metadata.get('edgelora.base.id', 'not recorded')}"


def _inherited(files: Sequence[LoraFile]) -> tuple[dict[str, Scalar], tuple[str, ...]]:
    """The entries that the sources agree on, and warnings where they do not."""
    warnings = []
    facts: dict[str, Scalar] = {
        "edgelora.format_version": FORMAT_VERSION,
        "edgelora.name": "+".join(_name(file) for file in files)[:200],
    }
    recording = [file for file in files if file.metadata.get("edgelora.template")]
    templates = _distinct(files, "edgelora.template")
    if templates:
        facts["edgelora.template"] = templates[0]
    if len(templates) > 1:
        warnings.append(
            f"the adapters were trained with {len(templates)} different prompt templates; "
            f"the file records that of {_name(recording[0])}"
        )
    if licences := _distinct(files, "edgelora.licence"):
        facts["edgelora.licence"] = "; ".join(licences)
    known = next((f for f in files if f"{BASE_PREFIX}id" in f.metadata), None)
    if known is None:
        warnings.append("no adapter records the base that it was made for")
    else:
        own = ((k, v) for k, v in known.metadata.items() if k.startswith(BASE_PREFIX))
        facts |= {k: v for k, v in own if isinstance(v, str)}
    return facts, tuple(warnings)


def _by_weight(files: Sequence[LoraFile], coefficients: Coefficients) -> list[LoraFile]:
    """The sources, those with the largest coefficients first."""
    rows = _rows(coefficients)
    weights = [sum(np.abs(row[i]).sum() for row in rows) for i in range(len(files))]
    return [files[i] for i in sorted(range(len(files)), key=lambda i: -weights[i])]


def _rows(coefficients: Coefficients) -> list[NDArray[np.float64]]:
    """Those of each tensor, or the one row of all."""
    rows = coefficients.values() if isinstance(coefficients, Mapping) else [coefficients]
    return [np.asarray(row, np.float64) for row in rows]


def _name(file: LoraFile) -> str:
    return str(file.metadata.get("edgelora.name") or file.path.stem)


def _distinct(files: Sequence[LoraFile], key: str) -> list[str]:
    return list(dict.fromkeys(str(file.metadata[key]) for file in files if file.metadata.get(key)))


def _provenance(
    files: Sequence[LoraFile],
    coefficients: Coefficients,
    combination: Combination,
    method: str,
    rank: int | str,
    scale: float,
    facts: Mapping[str, Scalar],
) -> dict[str, object]:
    names = [report.name for report in combination.reports]
    return {
        "tool": TOOL,
        "method": method,
        "rank": rank,
        "scale": scale,
        "sources": [
            {
                "name": _name(file),
                "sha256": file.sha256,
                "licence": file.metadata.get("edgelora.licence"),
                "source": file.metadata.get("edgelora.source"),
            }
            | describe_coefficients(_column(coefficients, names, index), names, file.ranks)
            for index, file in enumerate(files)
        ],
        "error": _rounded(combination.error),
        "tensors": {report.name: _told(report) for report in combination.reports},
        "cancelled": list(combination.cancelled),
        "base": facts.get(f"{BASE_PREFIX}id"),
        "template": facts.get("edgelora.template"),
    }


def _column(coefficients: Coefficients, names: Sequence[str], index: int) -> NDArray[np.float64]:
    """The coefficients of one source for each tensor, (n,), or for each component too, (n, r)."""
    if isinstance(coefficients, Mapping):
        return np.array([np.asarray(coefficients[name])[index] for name in names])
    return np.full(len(names), coefficients[index])


def _rounded(value: float) -> float:
    """Six digits: the rest depends on the linear algebra library."""
    return float(f"{value:.6g}")


def _told(report: TensorReport) -> dict[str, float]:
    """What the account says of one tensor; a bound that rounds to nothing is left out."""
    told = {"rank": report.rank, "error": _rounded(report.error)}
    excess = float(f"{report.excess:.1g}")
    return told | ({"excess": excess} if excess > EXCESS_TOLD else {})
