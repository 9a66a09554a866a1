"""Distances between datasets on embeddings, in units of the bank's own spread.

Each text field (prompts, completions) is measured apart and the two are added with a weight. Before
that the space is centred at the bank's mean and whitened by the bank's covariance: hidden states of
a language model share one large offset and a few large directions that say nothing about the task.

An adapter without completions gets the mean completion distance of those that have them; where the
target has none, or no adapter has, prompts alone count (`fields_used` tells).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.operators.whitening import Space, moment_space, sample_space
from edgelora.signature import Signature, TextDistribution

COMPLETION_WEIGHT = 0.5
N_SLICES = 64
SINKHORN_REGULARISATION = 0.5  # of the median cost in the bank; at 0.1 outliers did not converge
Array = NDArray[np.float64]
FieldDistance = Callable[[Space, TextDistribution, TextDistribution], float]


def fields_used(target: Signature, others: Sequence[Signature]) -> tuple[str, ...]:
    """The text fields that a comparison can use: ("prompt",) or ("prompt", "completion")."""
    if target.completion is None or all(other.completion is None for other in others):
        return ("prompt",)
    return ("prompt", "completion")


def cosine(
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    completion_weight: float = COMPLETION_WEIGHT,
) -> Array:
    """1 - cosine of the centred and whitened means, in [0, 2]; 1 where a mean is the bank's."""

    def between(space: Space, a: TextDistribution, b: TextDistribution) -> float:
        x, y = space.mean(a), space.mean(b)
        lengths = float(np.linalg.norm(x) * np.linalg.norm(y))
        return 1.0 - float(x @ y) / lengths if lengths > 0 else 1.0

    return _combine(between, moment_space, target, others, completion_weight)


def bures(
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    completion_weight: float = COMPLETION_WEIGHT,
) -> Array:
    """Bures-Wasserstein distance between the two Gaussians, from their low-rank moments.

    The variance outside the leading directions is one more isotropic block, independent of them.
    """

    def between(space: Space, a: TextDistribution, b: TextDistribution) -> float:
        shift = space.mean(a) - space.mean(b)
        residual = space.residual_deviation(a) - space.residual_deviation(b)
        squared = bures_squared(space.factor(a), space.factor(b))
        return float(np.sqrt(shift @ shift + squared + residual**2))

    return _combine(between, moment_space, target, others, completion_weight)


def bures_squared(a: Array, b: Array) -> float:
    """Squared Bures distance between the covariances a.T @ a and b.T @ b.

    tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, the last trace being the sum of the singular values of
    a @ b.T (Bhatia, Jain and Lim, 2019, "On the Bures-Wasserstein distance", equation 4).

    Args:
        a: (q, d) float64.  b: (q', d) float64.
    """
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum() if len(a) and len(b) else 0.0
    return max(float((a**2).sum() + (b**2).sum() - 2.0 * overlap), 0.0)


def sliced(
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    completion_weight: float = COMPLETION_WEIGHT,
) -> Array:
    """Sliced 2-Wasserstein distance between the samples, over 64 seeded directions (POT)."""
    from ot.sliced import get_random_projections, sliced_wasserstein_distance

    def between(space: Space, a: TextDistribution, b: TextDistribution) -> float:
        x, y = space.points(a), space.points(b)
        directions = get_random_projections(x.shape[1], N_SLICES, seed)
        return float(sliced_wasserstein_distance(x, y, projections=directions))

    return _combine(between, sample_space, target, others, completion_weight)


def sinkhorn(
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    completion_weight: float = COMPLETION_WEIGHT,
) -> Array:
    """Sinkhorn divergence between the samples with squared Euclidean cost (POT).

    S(a, b) - S(a, a) / 2 - S(b, b) / 2 of the entropic transport costs, which is 0 for equal
    samples (Genevay, Peyre and Cuturi, 2018, arXiv:1706.00292).
    """

    @functools.cache
    def cost(space: Space, a: TextDistribution, b: TextDistribution) -> float:
        regularisation = SINKHORN_REGULARISATION * space.median_squared
        return _transport_cost(space.points(a), space.points(b), regularisation)

    def between(space: Space, a: TextDistribution, b: TextDistribution) -> float:
        return max(cost(space, a, b) - (cost(space, a, a) + cost(space, b, b)) / 2, 0.0)

    return _combine(between, sample_space, target, others, completion_weight)


def rbf_mmd(
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    completion_weight: float = COMPLETION_WEIGHT,
) -> Array:
    """MMD between the samples: RBF kernels of three widths around the bank's median distance."""

    def between(space: Space, a: TextDistribution, b: TextDistribution) -> float:
        x, y = space.points(a), space.points(b)
        h = space.median_squared
        squared = rbf(x, x, h).mean() + rbf(y, y, h).mean() - 2.0 * rbf(x, y, h).mean()
        return float(np.sqrt(max(squared, 0.0)))

    return _combine(between, sample_space, target, others, completion_weight)


def energy(
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    completion_weight: float = COMPLETION_WEIGHT,
) -> Array:
    """Energy distance between the samples: sqrt(2 E|x - y| - E|x - x'| - E|y - y'|)."""

    def between(space: Space, a: TextDistribution, b: TextDistribution) -> float:
        x, y = space.points(a), space.points(b)
        squared = 2.0 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)
        return float(np.sqrt(max(squared, 0.0)))

    return _combine(between, sample_space, target, others, completion_weight)


def rbf(x: Array, y: Array, median_squared: float) -> Array:
    """(m, n): the mean of exp(-d^2 / h) over h = 4, 2 and 1 times the median squared distance."""
    from scipy.spatial.distance import cdist

    wide: Array = np.exp(cdist(x, y, "sqeuclidean") / (-4.0 * median_squared))
    middle = wide * wide
    return (wide + middle + middle * middle) / 3.0


def _mean_distance(x: Array, y: Array) -> float:
    from scipy.spatial.distance import cdist

    return float(cdist(x, y).mean())


def _transport_cost(x: Array, y: Array, regularisation: float) -> float:
    from ot.bregman import sinkhorn_log
    from scipy.spatial.distance import cdist

    cost = cdist(x, y, "sqeuclidean")
    plan = sinkhorn_log(
        np.full(len(x), 1 / len(x)),
        np.full(len(y), 1 / len(y)),
        cost,
        regularisation,
        numItermax=2_000,
        stopThr=1e-6,
    )
    return float((plan * cost).sum())


def _combine(
    between: FieldDistance,
    open_space: Callable[[Sequence[TextDistribution]], Space],
    target: Signature,
    others: Sequence[Signature],
    completion_weight: float,
) -> Array:
    """The weighted sum of the fields' distances from the target to each other, (k,)."""
    used = fields_used(target, others)
    shares = {"prompt": 1.0 - completion_weight, "completion": completion_weight}
    if used == ("prompt",):
        shares["prompt"] = 1.0
    total = np.zeros(len(others))
    for name in used:
        own = target.fields()[name]
        theirs = [other.fields().get(name) for other in others]
        known = [field for field in theirs if field is not None]
        space = open_space(known)
        found = [np.nan if field is None else between(space, own, field) for field in theirs]
        measured = np.array(found, np.float64)
        total += shares[name] * np.where(np.isnan(measured), np.nanmean(measured), measured)
    return total
