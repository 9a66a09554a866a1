"""A build made again from what its file records, and compared with the file, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.base import Base
from edgelora.adapters.gguf_lora import LoraFile, check, open_lora
from edgelora.adapters.lora import LoraPair, for_components
from edgelora.adapters.lowrank import product_norm
from edgelora.adapters.merge import MergeReport, merge_adapters
from edgelora.adapters.provenance import PROVENANCE_KEY, read_provenance
from edgelora.adapters.recipe import Coefficient, Recipe, RecordedSource, read_recipe
from edgelora.bank import Bank
from edgelora.build.records import count_steps
from edgelora.errors import AlreadyExists, EdgeLoRAError, IncompatibleAdapter, InvalidFile, NotFound
from edgelora.files import allow_open_files, sha256_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TensorDifference:
    """How far a tensor's update is from the recorded file's.

    Attributes:
        relative: Frobenius norm of the difference of the updates over that of the recorded one.
    """

    name: str
    relative: float


@dataclass(frozen=True)
class Repeated:
    """What was written, and how it differs from the file that it was made from.

    Attributes:
        sha256, recorded_sha256: of the new file, and of the one that told how.
        header: every difference of the headers, one line each.
        tensors: those whose bytes differ, the largest difference first.
        rounded: whether coefficients by tensor were recorded, as float16 (see recipe.Recipe).
    """

    out: Path
    sha256: str
    recorded_sha256: str
    header: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]
    rounded: bool
    merge: MergeReport

    @property
    def is_same(self) -> bool:
        """Whether the bytes are the same."""
        return self.sha256 == self.recorded_sha256


def repeat(
    recorded: LoraFile,
    bank: Bank,
    base: Base,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Repeated:
    """Combine the recorded sources with the recorded coefficients into `out`, and compare.

    The search for coefficients is not run again: it needs the examples, which no file holds.

    Args:
        progress: (stage, steps done, steps in all).

    Raises:
        UnsupportedFile, InvalidFile: see recipe.read_recipe.
        IncompatibleAdapter: another base, or a source that does not fit it.
        NotFound: sources that are missing in the bank or are not the same bytes; all are named.
        AlreadyExists: `out` exists and `force` is false.
    """
    recipe = read_recipe(recorded)
    if out.resolve() == recorded.path.resolve():
        raise EdgeLoRAError(f"{out}: is the adapter itself", hint="Write to another file.")
    if out.exists() and not force:
        raise AlreadyExists(f"{out} exists already", hint="Choose another name or add --force.")
    if recipe.base_id and recipe.base_id != base.identity.id:
        raise IncompatibleAdapter(
            f"{recorded.path}: built for another base",
            problems=[
                f"the adapter's base: {recipe.base_id}",
                f"the base in use:    {base.identity.describe()}",
            ],
        )
    files = find_sources(recipe, bank, base, progress)
    if any(out.resolve() == file.path.resolve() for file in files):
        raise EdgeLoRAError(f"{out}: is one of the sources", hint="Write to another file.")
    # Known now: read after the merge, a file that `out` replaced could be another.
    recorded_sha256 = recorded.sha256
    merge = _merge(recipe, files, out, force, progress)
    new = open_lora(out)
    return Repeated(
        out,
        new.sha256,
        recorded_sha256,
        tuple(_header_differences(recorded, new)),
        tuple(_tensor_differences(recorded, new, progress)),
        recipe.by_tensor,
        merge,
    )


def find_sources(
    recipe: Recipe,
    bank: Bank,
    base: Base,
    progress: Progress = lambda stage, done, total: None,
) -> list[LoraFile]:
    """The bank's files that the recipe names, each the same bytes as then.

    Raises:
        NotFound: some are missing or differ.
        IncompatibleAdapter: some do not fit the base.
    """
    paths = {record.name: record.path for record in bank.records()}
    problems, found = [], []
    allow_open_files(len(recipe.sources))
    for done, source in enumerate(recipe.sources):
        progress("checking sources", done, len(recipe.sources))
        problem = _source_problem(source, paths)
        if problem:
            problems.append(problem)
        else:
            found.append(open_lora(paths[source.name]))
    progress("checking sources", len(recipe.sources), len(recipe.sources))
    if problems:
        raise NotFound(
            f"{len(problems)} of {len(recipe.sources)} sources are not in {bank.path} as they were",
            problems=problems,
            hint="Give the bank that the adapter was built from.",
        )
    misfits = [f"{lora.path}: {problem}" for lora in found for problem in check(lora, base)]
    if misfits:
        raise IncompatibleAdapter("sources that do not fit the base", problems=misfits[:20])
    return found


def _source_problem(source: RecordedSource, paths: Mapping[str, Path]) -> str:
    path = paths.get(source.name)
    if path is None:
        return f"{source.name}: missing (sha256 {source.sha256})"
    sha256 = sha256_of(path)
    if sha256 == source.sha256:
        return ""
    return f"{source.name}: other bytes, sha256 {sha256}, recorded {source.sha256}"


def _merge(
    recipe: Recipe, files: list[LoraFile], out: Path, force: bool, progress: Progress
) -> MergeReport:
    names = list(dict.fromkeys(name for file in files for name in file.names))
    unknown = sorted(set(recipe.coefficients) - set(names))
    if unknown:
        raise IncompatibleAdapter(
            "the provenance names tensors that no source has", problems=unknown[:20]
        )
    rows = _rows(recipe, names, files)
    return merge_adapters(
        files,
        rows,
        out,
        method=recipe.method,
        rank=recipe.rank,
        scale=recipe.scale,
        dtype=recipe.dtype,
        metadata=recipe.facts,
        provenance=recipe.told,
        force=force,
        progress=count_steps("combining", len(names), progress),
    )


def _rows(
    recipe: Recipe, names: Sequence[str], files: Sequence[LoraFile]
) -> dict[str, NDArray[np.float64]]:
    """(k,) for each tensor; or (k, r) for all, padded to the largest rank, where some source has
    one coefficient for each component.

    Raises:
        InvalidFile: fewer coefficients than a source has components.
    """
    zeros = (0.0,) * len(files)
    recorded = {name: recipe.coefficients.get(name, zeros) for name in names}
    if not any(isinstance(c, list) for row in recorded.values() for c in row):
        return {name: np.array(row, np.float64) for name, row in recorded.items()}
    short = [
        f"{name}: {len(c)} coefficients for {file.rank(name)} components of {file.path.name}"
        for name, row in recorded.items()
        for c, file in zip(row, files, strict=True)
        if isinstance(c, list) and name in file.plan and len(c) < file.rank(name)
    ]
    if short:
        raise InvalidFile("the provenance does not fit its sources", problems=short[:20])
    width = max(rank for file in files for rank in file.ranks.values())
    return {name: np.array([_padded(c, width) for c in row]) for name, row in recorded.items()}


def _padded(coefficient: Coefficient, width: int) -> NDArray[np.float64]:
    values = for_components(coefficient, width)
    return np.pad(values, (0, width - len(values)))


def _header_differences(recorded: LoraFile, new: LoraFile) -> list[str]:
    then, now = dict(recorded.metadata), dict(new.metadata)
    then.pop(PROVENANCE_KEY, None)
    now.pop(PROVENANCE_KEY, None)
    found = _differences(then, now)
    told = [
        {key: json.dumps(value) for key, value in read_provenance(file).items()}
        for file in (recorded, new)
    ]
    found += [f"provenance, {line}" for line in _differences(*told)]
    return found + _plan_differences(recorded, new)


def _plan_differences(recorded: LoraFile, new: LoraFile) -> list[str]:
    found = [f"{name}: not in the new file" for name in recorded.names if name not in new.plan]
    found += [f"{name}: only in the new file" for name in new.names if name not in recorded.plan]
    return found + [
        f"{name}: rank {recorded.rank(name)}, now {new.rank(name)}"
        for name in recorded.names
        if name in new.plan and recorded.rank(name) != new.rank(name)
    ]


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {_short(then.get(key))}, now {_short(now.get(key))}"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key)
    ]


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tensor_differences(
    recorded: LoraFile, new: LoraFile, progress: Progress
) -> list[TensorDifference]:
    """Of the tensors that both have, those whose bytes differ; the largest first."""
    common = [name for name in recorded.names if name in new.plan]
    found = []
    for done, name in enumerate(common):
        progress("comparing", done, len(common))
        then, now = recorded.pair(name), new.pair(name)
        if not _equal_bits(then, now):
            found.append(TensorDifference(name, relative_difference(then, now)))
    progress("comparing", len(common), len(common))
    return sorted(found, key=lambda difference: -difference.relative)


def _equal_bits(first: LoraPair, second: LoraPair) -> bool:
    return first.scale == second.scale and all(
        a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in ((first.lora_a, second.lora_a), (first.lora_b, second.lora_b))
    )


def relative_difference(then: LoraPair, now: LoraPair) -> float:
    """Frobenius norm of (now - then) over that of `then`, of the updates and not the factors.

    Factors of one update may differ in signs and order; the update itself is what counts. Near 0
    the precision is that of differences of squares in float64, about 1e-8.
    """
    first_b = then.lora_b.astype(np.float32) * np.float32(then.scale)
    second_b = now.lora_b.astype(np.float32) * np.float32(now.scale)
    lora_a = np.concatenate([then.lora_a, now.lora_a], dtype=np.float32)
    difference = product_norm(np.concatenate([-first_b, second_b], axis=1), lora_a)
    norm = product_norm(first_b, then.lora_a.astype(np.float32))
    return difference / norm if norm else float("inf") if difference else 0.0
