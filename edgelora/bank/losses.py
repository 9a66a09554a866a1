"""How adapters of a bank do on each other's datasets: losses by llama.cpp, kept as they come.

A few lines of each dataset, in two halves, are scored under the base and under every adapter from
another source. What was measured is kept in the bank's folder after each adapter, so that a run
that was stopped goes on, and new adapters cost their own passes only.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.bank.calibration import losses_path, read_limited
from edgelora.bank.records import BankRecord
from edgelora.bank.store import Bank
from edgelora.datasets.records import Dataset
from edgelora.datasets.template import Template
from edgelora.engine.context import Context
from edgelora.engine.model import Model, WeightedAdapter
from edgelora.engine.prepare import tokenise_examples
from edgelora.engine.score import TokenisedExample, count_tokens, mean_loss, score
from edgelora.errors import DatasetError, EdgeLoRAError, EngineError, InvalidFile
from edgelora.files import write_atomic

Array = NDArray[np.float64]
Halves = tuple[float, float]
FORMAT_VERSION = 1
DEFAULT_LINES = 4
DEFAULT_BUDGET = 1_000_000
BASE = ""
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True, eq=False)
class Target:
    """Some lines of the dataset of one adapter.

    Attributes:
        halves: tokenised examples; each half has at least one.
        key: a hash of their tokens.
    """

    name: str
    halves: tuple[list[TokenisedExample], list[TokenisedExample]]
    key: str

    @property
    def n_tokens(self) -> int:
        """What one pass over both halves computes."""
        return sum(count_tokens(half) for half in self.halves)


@dataclass
class Losses:
    """What was measured: adapter (BASE: none) -> target -> nats a token on each half.

    Attributes:
        targets, adapters: by name, hashes of the lines and of the adapters' contents.
    """

    targets: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, Halves]] = field(default_factory=dict)

    def matrix(self, names: Sequence[str]) -> tuple[Array, Array]:
        """Losses (2, n, n), [h, target, adapter], and the base's (2, n); NaN where unknown."""
        n = len(names)
        losses, base = np.full((2, n, n), math.nan), np.full((2, n), math.nan)
        for i, target in enumerate(names):
            base[:, i] = self.values.get(BASE, {}).get(target, (math.nan, math.nan))
            for j, adapter in enumerate(names):
                found = self.values.get(adapter, {}).get(target, (math.nan, math.nan))
                losses[:, i, j] = found
        return losses, base


def make_target(
    name: str, dataset: Dataset, model: Model, template: Template, n_lines: int, seed: int
) -> Target:
    """At most `n_lines` lines with completions, drawn by the seed, every second one in each half.

    Raises:
        DatasetError: fewer than two such lines.
    """
    usable = [example for example in dataset.examples if example.completion is not None]
    if len(usable) < 2:
        raise DatasetError(f"{dataset.path}: fewer than 2 examples with completions")
    drawn = random.Random(seed).sample(usable, min(n_lines, len(usable)))
    examples = tokenise_examples(model, template, drawn)
    halves = (examples[::2], examples[1::2])
    ids = [[(e.prompt, e.completion) for e in half] for half in halves]
    return Target(name, halves, hashlib.sha256(json.dumps(ids).encode()).hexdigest())


def missing_passes(
    known: Losses, targets: Sequence[Target], adapters: Sequence[BankRecord]
) -> dict[str, list[Target]]:
    """What is still to be measured, by adapter; BASE comes first. No adapter is its own target's.

    Adapters that share a source with a target are left out: they never serve it.
    """
    owners = {record.name: record for record in adapters}
    wanted: dict[str, list[Target]] = {BASE: list(targets)}
    for record in adapters:
        wanted[record.name] = [t for t in targets if not record.is_sibling(owners[t.name])]
    missing = {}
    for name, asked in wanted.items():
        done = known.values.get(name, {})
        if rest := [target for target in asked if target.name not in done]:
            missing[name] = rest
    return missing


def measure_losses(
    bank: Bank,
    context: Context,
    known: Losses,
    missing: Mapping[str, Sequence[Target]],
    adapters: Sequence[BankRecord],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure what is missing, and keep it in the bank's folder after each adapter.

    Args:
        known: what was read with `read_losses`; it is added to.
        progress: (tokens done, in all).

    Raises:
        EngineError: a text that is longer than the context, or a loss that is no number.
        BankError: a full disk, a lock that stays held.
    """
    files = {record.name: record.path for record in adapters}
    path = losses_path(bank, context.model.base.identity.id)
    total, done = count_missing(missing), 0
    for name, targets in missing.items():
        context.apply([] if name == BASE else [WeightedAdapter(files[name])])
        found = {}
        for target in targets:
            progress(done, total)
            found[target.name] = _score(context, target, name)
            done += target.n_tokens
        known.values.setdefault(name, {}).update(found)
        context.apply([])
        if name != BASE:
            context.model.unload(files[name])
        with bank.writing():
            _write(path, known)
    progress(total, total)


def _score(context: Context, target: Target, adapter: str) -> Halves:
    try:
        first, second = (mean_loss(score(context, half)) for half in target.halves)
    except EngineError as error:
        raise EngineError(f"the dataset of {target.name}: {error.what}", hint=error.hint) from error
    if not (math.isfinite(first) and math.isfinite(second)):
        raise EngineError(
            f"{adapter or 'the base'}: its loss on the dataset of {target.name} is not a number",
            hint="See `edgelora bank verify`; `edgelora bank rm` takes an adapter out.",
        )
    return first, second


def count_missing(missing: Mapping[str, Sequence[Target]]) -> int:
    """Tokens that measuring what is missing computes."""
    return sum(target.n_tokens for targets in missing.values() for target in targets)


def refuse_over_budget(
    missing: Mapping[str, Sequence[Target]], budget_tokens: int, n_lines: int
) -> None:
    """Raise EdgeLoRAError where measuring takes more tokens than are allowed."""
    n_tokens = count_missing(missing)
    if n_tokens > budget_tokens:
        raise EdgeLoRAError(
            f"measuring {len(missing)} adapter(s) on up to {n_lines} lines of each dataset takes "
            f"{n_tokens:,} tokens; the budget is {budget_tokens:,}",
            hint="Give a larger --budget, or fewer --lines (2 at least).",
        )


def read_losses(
    bank: Bank, base_id: str, targets: Sequence[Target], adapters: Sequence[BankRecord]
) -> Losses:
    """What an earlier run measured on the same lines under the same adapters.

    Raises:
        InvalidFile: a damaged file.
    """
    path = losses_path(bank, base_id)
    keys = {target.name: target.key for target in targets}
    hashes = {record.name: record.content_sha256 for record in adapters}
    if not path.is_file():
        return Losses(keys, hashes)
    stored = parse_losses(read_limited(path), str(path))
    same = {name for name, key in keys.items() if stored.targets.get(name) == key}
    values = {
        adapter: {target: value for target, value in row.items() if target in same}
        for adapter, row in stored.values.items()
        if adapter == BASE or stored.adapters.get(adapter) == hashes.get(adapter, "")
    }
    return Losses(keys, hashes, values)


def parse_losses(data: bytes, where: str) -> Losses:
    """Read what `measure_losses` kept, trusting nothing in it.

    Raises:
        InvalidFile: not such a file.
    """
    try:
        content = json.loads(data)
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']!r}")
        values = {
            str(adapter): {str(target): _halves(value) for target, value in row.items()}
            for adapter, row in content["losses"].items()
        }
        return Losses(_texts(content["targets"]), _texts(content["adapters"]), values)
    except _MALFORMED as error:
        raise InvalidFile(
            f"{where}: not a sound file of losses ({type(error).__name__}: {error})",
            hint="Delete it; they are measured again then.",
        ) from error


def _write(path: Path, known: Losses) -> None:
    content: dict[str, object] = {"version": FORMAT_VERSION, "losses": known.values}
    content |= {"targets": known.targets, "adapters": known.adapters}
    write_atomic(path, json.dumps(content, sort_keys=True).encode() + b"\n")


def _halves(value: Any) -> Halves:
    first, second = value
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in (first, second)):
        raise ValueError("a loss that is no number")
    return float(first), float(second)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(value, str) for value in values.values()):
        raise TypeError("a hash that is no text")
    return dict(values)
