"""What an arm recovers of the own adapters' gain: ratio of means, median, intervals, harm."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelora.metrics import paired_bootstrap

MIN_GAP = 0.2  # nats between the base and the own adapter, below which there is nothing to recover
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Recovered:
    """An arm over many tasks, by loss; NaN where no task has a gap.

    Attributes:
        n_tasks: with a gap above the least one; the next four are of these.
        ratio: sum(base - arm) / sum(base - own).
        low, high: its 95 % interval, by a bootstrap of families.
        median: of the tasks' own ratios.
        below: the share of all tasks whose loss is above the base's.
        worst: the largest loss - base of all tasks, nats.
    """

    n_tasks: int
    ratio: float
    low: float
    high: float
    median: float
    below: float
    worst: float


def recovered(
    base: ArrayLike,
    arm: ArrayLike,
    own: ArrayLike,
    families: Sequence[Hashable],
    *,
    min_gap: float = MIN_GAP,
) -> Recovered:
    """The recovered share of an arm.

    Args:
        base, arm, own: (n,) losses of each task in nats a token.
        families: (n,) a label for each task; those of one label are drawn together.

    Raises:
        ValueError: no task, or lengths that differ.

    Example:
        >>> r = recovered([5.0, 2.0], [2.0, 2.1], [1.0, 1.0], ["a", "b"])
        >>> round(r.ratio, 2), round(r.median, 3), r.below, round(r.worst, 1)
        (0.58, 0.325, 0.5, 0.1)
    """
    b, a, o = _columns(base, arm, own)
    low, ratio, high = _ratio(b - a, b - o, families, min_gap)
    kept = b - o > min_gap
    shares = (b - a)[kept] / (b - o)[kept]
    return Recovered(
        n_tasks=int(kept.sum()),
        ratio=ratio,
        low=low,
        high=high,
        median=float(np.median(shares)) if len(shares) else math.nan,
        below=float((a > b).mean()),
        worst=float((a - b).max()),
    )


def ahead(
    first: ArrayLike,
    second: ArrayLike,
    base: ArrayLike,
    own: ArrayLike,
    families: Sequence[Hashable],
    *,
    min_gap: float = MIN_GAP,
) -> tuple[float, float, float]:
    """By how much the recovered share of `first` exceeds that of `second`: (low, mid, high).

    Args: as of `recovered`; paired by task.
    """
    a, s, b = _columns(first, second, base)
    return _ratio(s - a, b - np.asarray(own, np.float64), families, min_gap)


def _ratio(
    gains: Array, gaps: Array, families: Sequence[Hashable], min_gap: float
) -> tuple[float, float, float]:
    kept = [int(i) for i in np.flatnonzero(gaps > min_gap)]
    if not kept:
        return math.nan, math.nan, math.nan
    return paired_bootstrap(gains[kept], gaps[kept], [families[i] for i in kept])


def _columns(*columns: ArrayLike) -> list[Array]:
    arrays = [np.asarray(column, np.float64) for column in columns]
    if any(array.shape != arrays[0].shape for array in arrays) or not arrays[0].size:
        raise ValueError(f"columns of shapes {[array.shape for array in arrays]}")
    return arrays
