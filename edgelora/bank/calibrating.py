"""Calibrating a bank on itself: its datasets compared, and losses where its data is at hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.bank.losses import (
    DEFAULT_BUDGET,
    DEFAULT_LINES,
    Target,
    count_missing,
    make_target,
    measure_losses,
    missing_passes,
    read_losses,
    refuse_over_budget,
)
from edgelora.bank.records import BankRecord
from edgelora.bank.requests import find_file
from edgelora.bank.store import Bank
from edgelora.datasets.records import Dataset
from edgelora.datasets.template import Template
from edgelora.engine.context import open_context
from edgelora.engine.model import Model
from edgelora.errors import BankError, DatasetError
from edgelora.operators.calibration import MIN_TARGETS, Evidence
from edgelora.operators.distances import measure
from edgelora.operators.embedding_distances import COMPLETION_WEIGHT
from edgelora.operators.mixture import kernel_means

Array = NDArray[np.float64]
MAX_TARGETS = 64  # datasets that take a turn; of more, as many are drawn by the seed
DISTANCES = ("bures", "cosine")
Progress = Callable[[int, int], None]


def signed_adapters(bank: Bank, base_id: str) -> list[BankRecord]:
    """The adapters for one base that have a signature.

    Raises:
        BankError: a damaged bank, or fewer than a calibration needs.
    """
    records = [r for r in bank.records() if r.base_id == base_id and r.has_signature]
    if len(records) < MIN_TARGETS:
        raise BankError(
            f"{bank.path}: {len(records)} adapter(s) for this base have a signature; a calibration "
            f"needs {MIN_TARGETS}",
            hint="Make signatures with `edgelora bank add --data-glob`.",
        )
    return records


def draw_targets(records: Sequence[BankRecord], seed: int) -> list[str]:
    """The names of the adapters whose datasets take a turn, in the bank's order."""
    names = [record.name for record in records]
    if len(names) <= MAX_TARGETS:
        return names
    chosen = set(random.Random(seed).sample(names, MAX_TARGETS))
    return [name for name in names if name in chosen]


def compare_datasets(
    bank: Bank,
    records: Sequence[BankRecord],
    targets: Sequence[str],
    distances: Sequence[str] = DISTANCES,
    *,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Evidence:
    """What signatures, sources and categories tell; losses may join it.

    The distances of a dataset are measured in the space of the adapters that may serve it, as in
    a build.

    Args:
        targets: names of the adapters whose datasets take a turn.
        distances: names of operators.distances.DISTANCES, at least one.

    Raises:
        InvalidFile: a damaged signature.
        IncompatibleAdapter: signatures of different sizes.
    """
    signatures = [bank.signature(record.name, record.base_id) for record in records]
    n = len(records)
    found = {name: np.full((n, n), np.nan) for name in distances}
    turns = [i for i, record in enumerate(records) if record.name in targets]
    for done, i in enumerate(turns):
        progress(done, len(turns))
        others = [j for j in range(n) if not records[i].is_sibling(records[j])]
        known = [signatures[j] for j in others]
        for name, matrix in found.items():
            if others:
                matrix[i, others] = measure(name, signatures[i], known, seed=seed)
    progress(len(turns), len(turns))
    gram, _, _ = kernel_means(signatures[0], signatures, COMPLETION_WEIGHT)
    return Evidence(
        names=tuple(record.name for record in records),
        sources=tuple(record.sources for record in records),
        categories=tuple(record.category for record in records),
        distances=found,
        gram=gram,
    )


def find_datasets(
    records: Sequence[BankRecord],
    targets: Sequence[str],
    pattern: str,
    read: Callable[[Path], Dataset],
) -> dict[str, Dataset]:
    """The dataset of each target, by its name.

    Args:
        pattern: of a path in which {name} stands for the adapter's name; each matches one file.

    Raises:
        DatasetError: for some there is none.
        NotFound: for some there are several, or the pattern has other braces.
    """
    paths = {name: find_file(Path(name), pattern) for name in targets}
    absent = [name for name, path in paths.items() if path is None]
    if absent:
        raise DatasetError(
            f"no dataset matches {pattern} for {len(absent)} of {len(targets)} adapters",
            problems=absent[:10],
            hint="{name} stands for the name that `edgelora bank ls` shows.",
        )
    return {name: read(path) for name, path in paths.items() if path is not None}


def make_targets(
    model: Model, template: Template, datasets: Mapping[str, Dataset], n_lines: int, seed: int
) -> list[Target]:
    """Lines of each dataset to measure losses on; see losses.make_target."""
    return [
        make_target(name, dataset, model, template, n_lines, seed)
        for name, dataset in datasets.items()
    ]


def add_losses(
    bank: Bank,
    model: Model,
    records: Sequence[BankRecord],
    evidence: Evidence,
    targets: Sequence[Target],
    *,
    n_lines: int = DEFAULT_LINES,
    budget_tokens: int = DEFAULT_BUDGET,
    plan: Callable[[int, int], None] = lambda n_passes, n_tokens: None,
    progress: Progress = lambda done, total: None,
) -> Evidence:
    """The evidence with the losses of all adapters; what an earlier run measured is not again.

    Args:
        n_lines: that the targets were made with, for messages.
        plan: told before the first pass: adapters to measure, tokens.
        progress: (tokens done, in all).

    Raises:
        EdgeLoRAError: the budget is too small; nothing is measured.
        EngineError: a text that is too long, or a loss that is no number.
        BankError: a full disk, a lock that stays held.
    """
    known = read_losses(bank, model.base.identity.id, targets, records)
    missing = missing_passes(known, targets, records)
    refuse_over_budget(missing, budget_tokens, n_lines)
    plan(len(missing), count_missing(missing))
    if missing:
        # Losses are kept, and one run may go on where another with more free memory stopped.
        with open_context(model, kv_type="f16") as context:
            measure_losses(bank, context, known, missing, records, progress)
    losses, base_losses = known.matrix(evidence.names)
    return replace(evidence, losses=losses, base_losses=base_losses)
