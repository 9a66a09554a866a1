"""The paper's twelve cells (arXiv:2507.01806): four distances on token ids, three heads.

Temperature 1, no scale, the diagonal in the z-score, as in its code. There coefficients multiply
flattened state dicts, so A and B are averaged apart: "linear" of adapters.combine, the same thing
where all adapters have one rank and one alpha, as in its bank and in ours. With combine=exact the
same coefficients sum the updates themselves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gradient_quality.bed import Bed
from numpy.typing import NDArray

from edgelora.errors import NotFound
from edgelora.leave_one_out.splits import deal, families
from edgelora.operators.distances import measure
from edgelora.operators.heads import PAPER_TEMPERATURE, attentional, neural, normalized
from edgelora.operators.neural import NeuralHead, load_heads
from operators_benchmark.bench import Bench, Made

Array = NDArray[np.float64]
DISTANCES = ("wd", "kl", "js", "mmd")
HEADS = ("attentional", "normalized", "neural")
N_FOLDS = 5


def make_cell(bench: Bench, *, distance: str, head: str, combine: str = "linear") -> Made:
    """One of the twelve cells."""
    name = f"paper {distance} {head}"
    coefficients = bench.meter.shared(name, lambda: coefficients_of(bench, distance, head))
    return bench.combined(coefficients, combine=combine)


def coefficients_of(bench: Bench, distance: str, head: str) -> Array:
    """(k,) on the simplex; 0 for an adapter without a signature."""
    pool, case = bench.pool, bench.case

    def distances() -> Array:
        return measure(distance, bench.counts(), pool.others, seed=case.seed)

    found = bench.meter.shared(f"paper {distance}", distances)
    if head == "attentional":
        weights = attentional(found, temperature=PAPER_TEMPERATURE)
    elif head == "normalized":
        weights = normalized(found)
    else:
        weights = neural(found, head=fold_head(bench.heads, case.bed, case.task, distance))
    return pool.spread(pool.signed, weights)


def fold_of(bed: Bed) -> dict[str, int]:
    """The fold of each task: no source lies in two."""
    sources = {task: origin.sources for task, origin in bed.origins.items()}
    return deal(families(sources), N_FOLDS)


def head_path(folder: Path, fold: int) -> Path:
    """The Neural heads that saw no task of this fold."""
    return folder / f"fold{fold}.safetensors"


def fold_head(folder: Path, bed: Bed, task: str, distance: str) -> NeuralHead:
    """The Neural head for a task: trained on the other folds.

    Raises:
        NotFound: it was not trained yet.
    """
    path = head_path(folder, fold_of(bed)[task])
    heads = load_heads(path.read_bytes(), str(path)) if path.is_file() else {}
    if distance not in heads:
        raise NotFound(
            f"{path}: no Neural head for the distance {distance}",
            hint="Train them with `python scripts/benchmark_operators.py heads` and the same bed, "
            "in an environment with the `train` extra, or leave the neural arms out.",
        )
    return heads[distance]
