"""What a combination's own account says that it takes to combine the same again, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from edgelora.adapters.combine import AUTO, COMBINATIONS
from edgelora.adapters.gguf_lora import LoraFile, Scalar
from edgelora.adapters.lora_layout import DTYPES
from edgelora.adapters.provenance import PROVENANCE_KEY, read_coefficients, read_provenance
from edgelora.errors import InvalidFile, UnsupportedFile

# What merge_adapters writes into an account by itself; all else is what its caller knew.
OWN_KEYS = frozenset("tool method rank scale sources error tensors cancelled base template".split())
_MAX_RANK = 1 << 20
Coefficient = float | list[float]


@dataclass(frozen=True)
class RecordedSource:
    """One source as the account names it."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Recipe:
    """A combination as its file records it; see merge.merge_adapters for what the fields mean.

    Attributes:
        coefficients: by tensor, one for each source, or one for each of its rank-one components;
            tensors that are not named have zeros.
        by_tensor: whether some source's coefficients differ between tensors or components: those
            are recorded as float16. `build --refine gradient` rounds them before it combines, so
            nothing is lost; a caller of merge_adapters may not have.
        base_id: of the base that the sources were made for; "" where none is recorded.
        facts: the file's `edgelora.*` entries, without the account and the program's name.
        told: the part of the account that merge_adapters does not write by itself.
    """

    method: str
    rank: int | str
    scale: float
    dtype: str
    sources: tuple[RecordedSource, ...]
    coefficients: Mapping[str, tuple[Coefficient, ...]]
    by_tensor: bool
    base_id: str
    facts: Mapping[str, Scalar]
    told: Mapping[str, Any]


def read_recipe(lora: LoraFile) -> Recipe:
    """The recipe of a combination.

    Raises:
        UnsupportedFile: an adapter that coefficients do not determine: not combined, or trained.
        InvalidFile: an account that is damaged; every problem is listed.
    """
    account = read_provenance(lora)
    _refuse_others(lora, account)
    problems = _problems(account)
    if problems:
        raise InvalidFile(f"{lora.path}: its provenance is damaged", problems=problems[:20])
    packed = read_coefficients(account)
    recorded = [source for source in account["sources"] if "coefficients" in source]
    if unreadable := [s["name"] for s in recorded if str(s["name"]) not in packed]:
        raise InvalidFile(
            f"{lora.path}: its provenance is damaged",
            problems=[f"{name}: coefficients that cannot be read" for name in unreadable],
        )
    facts = {
        key: value
        for key, value in lora.metadata.items()
        if key.startswith("edgelora.") and key not in (PROVENANCE_KEY, "edgelora.created_by")
    }
    return Recipe(
        method=account["method"],
        rank=account["rank"],
        scale=float(account["scale"]),
        dtype=_dtype(lora),
        sources=tuple(RecordedSource(s["name"], s["sha256"]) for s in account["sources"]),
        coefficients=_coefficients(account, packed),
        by_tensor=bool(packed),
        base_id=str(account.get("base") or ""),
        facts=facts,
        told={key: value for key, value in account.items() if key not in OWN_KEYS},
    )


def _refuse_others(lora: LoraFile, account: Mapping[str, Any]) -> None:
    if not account:
        raise UnsupportedFile(
            f"{lora.path}: does not say how it was made",
            hint="Only files of `edgelora build` and `edgelora merge` can be made again.",
        )
    trained = account.get("trained")
    if account.get("method") == "trained" or trained is not None:
        steps = trained if isinstance(trained, dict) else {}
        raise UnsupportedFile(
            f"{lora.path}: its factors were trained, so coefficients do not determine them",
            problems=[f"{key}: {value}" for key, value in steps.items()]
            + [f"{key}: {account[key]}" for key in ("operator", "seed") if key in account],
            hint="Run the build itself again, on the same data with the same options: "
            f"edgelora build --data DATA --polish {steps.get('passes', 'N')} "
            f"--seed {account.get('seed', 'N')} ...",
        )


def _problems(account: Mapping[str, Any]) -> list[str]:
    problems = []
    method, rank, scale = (account.get(key) for key in ("method", "rank", "scale"))
    if method not in COMBINATIONS:
        problems.append(f"method {method!r} is none of {', '.join(COMBINATIONS)}")
    if rank != AUTO and not (_is_whole(rank) and 1 <= rank <= _MAX_RANK):
        problems.append(f"rank {rank!r} is neither a whole number from 1 nor {AUTO}")
    if not _is_number(scale):
        problems.append(f"scale {scale!r} is not a number")
    if not isinstance(account.get("tensors"), dict) or not account["tensors"]:
        problems.append("it names no tensors")
    cancelled = account.get("cancelled", [])
    if not isinstance(cancelled, list) or not all(isinstance(name, str) for name in cancelled):
        problems.append("its cancelled tensors are no list of names")
    if not isinstance(account.get("base"), str | None):
        problems.append("its base is no text")
    sources = account.get("sources")
    if not isinstance(sources, list) or not sources:
        return [*problems, "it names no sources"]
    for number, source in enumerate(sources, 1):
        problems += [f"source {number}: {problem}" for problem in _source_problems(source)]
    names = [source.get("name") for source in sources if isinstance(source, dict)]
    if len(set(map(str, names))) < len(names):
        problems.append("two sources of one name")
    return problems


def _source_problems(source: object) -> list[str]:
    if not isinstance(source, dict):
        return ["not an object"]
    problems = []
    if not isinstance(source.get("name"), str):
        problems.append("has no name")
    if not re.fullmatch(r"[0-9a-f]{64}", str(source.get("sha256"))):
        problems.append("has no sha256")
    if not _is_number(source.get("coefficient")):
        problems.append("has no coefficient")
    return problems


def _coefficients(
    account: Mapping[str, Any], packed: Mapping[str, Mapping[str, Coefficient]]
) -> dict[str, tuple[Coefficient, ...]]:
    """A row for each tensor that was written or cancelled out; others had zeros only."""
    sources = account["sources"]
    rows: dict[str, tuple[Coefficient, ...]] = {
        name: tuple(
            packed[s["name"]][name] if s["name"] in packed else float(s["coefficient"])
            for s in sources
        )
        for name in account["tensors"]
    }
    alike = tuple(0.0 if s["name"] in packed else float(s["coefficient"]) for s in sources)
    return rows | {name: alike for name in account.get("cancelled", ()) if name not in rows}


def _dtype(lora: LoraFile) -> str:
    """The type of the factors, which merge_adapters writes all alike."""
    kinds = {info.ggml_type for info in lora.gguf.tensors.values()}
    if len(kinds) > 1:
        raise UnsupportedFile(f"{lora.path}: its factors are of several types")
    return next(name for name, kind in DTYPES.items() if kind in kinds)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
