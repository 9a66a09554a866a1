"""How good answers are: ROUGE-L, exact match, recovered share, bootstrap intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelora.errors import EdgeLoRAError

_Values = float | Sequence[float] | NDArray[np.float64]
_DRAWS_AT_ONCE = 256  # bounds the memory of a bootstrap over many examples


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in [0, 1] of an answer, for the best of its references (Lin, 2004, section 3).

    Computed by the rouge-score package with its Porter stemmer, as in the paper. Its tokenizer
    keeps Latin letters and digits only: text in another script scores 0.

    Raises:
        ValueError: there is no reference.
        EdgeLoRAError: rouge-score is not installed.

    Example:
        >>> rouge_l("the cat", ["a dog", "the cat sat"])
        0.8
    """
    _require_references(references)
    best = _rouge_scorer().score_multi(list(references), answer)["rougeL"]
    return float(best.fmeasure)


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer equals a reference after folding.

    Folding: case, runs of white space, and one final full stop do not count.

    Raises:
        ValueError: there is no reference.

    Example:
        >>> exact_match(" Yes. ", ["no", "yes"])
        True
    """
    _require_references(references)
    return _folded(answer) in map(_folded, references)


def recovered_share(base: _Values, adapter: _Values, own: _Values) -> float:
    """(base - adapter) / (base - own) as a ratio of means over tasks.

    Works for losses and for scores alike: both differences change sign together.

    Args:
        base, adapter, own: scalars or (n,) arrays: each task's value for the base, for the adapter
            under test and for the task's own adapter.

    Returns:
        The share; NaN where base and own agree on average, so that there is nothing to recover.
    """
    base_mean, adapter_mean, own_mean = (float(np.mean(v)) for v in (base, adapter, own))
    gap = base_mean - own_mean
    return (base_mean - adapter_mean) / gap if gap else math.nan


def paired_bootstrap(
    differences: ArrayLike,
    weights: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    n: int = 2_000,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """A percentile interval for sum(differences) / sum(weights), such as a difference in loss.

    Whole clusters are drawn with replacement, each example alone where no clusters are given
    (Efron and Tibshirani, 1993, chapter 13).

    Args:
        differences: (e,) for each example, e.g. its summed loss minus the base's.
        weights: (e,) e.g. its tokens; not negative, not all zero.
        clusters: for each example a label, e.g. its source dataset.

    Returns:
        (low, mid, high), mid being the ratio itself. A single cluster says nothing about variation:
        its interval is (-inf, mid, inf).

    Raises:
        ValueError: lengths differ, or the weights are negative or all zero.
    """
    sums = _cluster_sums(differences, weights, clusters)
    total, weight = sums.sum(axis=0)
    if weight <= 0 or (sums[:, 1] < 0).any():
        raise ValueError("weights must not be negative, nor all zero")
    mid = float(total / weight)
    size = len(sums)
    if size == 1:
        return -math.inf, mid, math.inf
    rng = np.random.default_rng(seed)
    ratios = []
    for start in range(0, n, _DRAWS_AT_ONCE):
        drawn = rng.multinomial(size, np.full(size, 1 / size), size=min(_DRAWS_AT_ONCE, n - start))
        numerator, denominator = (drawn @ sums).T
        # A draw of clusters without any weight says nothing; it is left out.
        ratios.append(numerator[denominator > 0] / denominator[denominator > 0])
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), mid, float(high)


def _cluster_sums(
    differences: ArrayLike, weights: ArrayLike, clusters: Sequence[Hashable] | None
) -> NDArray[np.float64]:
    """(c, 2) float64: the sums of differences and of weights in each cluster."""
    pairs = np.stack([np.asarray(differences, np.float64), np.asarray(weights, np.float64)], axis=1)
    if clusters is None:
        return pairs
    if len(clusters) != len(pairs):
        raise ValueError(f"{len(clusters)} cluster labels for {len(pairs)} examples")
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(label, len(numbers)) for label in clusters]
    sums = np.zeros((len(numbers), 2))
    np.add.at(sums, index, pairs)
    return sums


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise EdgeLoRAError(
            "ROUGE-L needs the rouge-score package, which is not installed",
            hint='Install it with: pip install "edgelora[eval]"',
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _require_references(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("at least one reference is needed")
