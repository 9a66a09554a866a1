"""Distances between datasets on embeddings, in units of the bank's own spread.

Each text field (prompts, completions) is measured apart and the two are added with a weight. Before
that the space is centred at the bank's mean and whitened by the bank's covariance: hidden states of
a language model share one large offset and a few large directions that say nothing about the task.

An adapter without completions gets the mean completion distance of those that have them; where the
target has none, or no adapter has, prompts alone count (`fields_used` tells).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.operators.whitening import Space, moment_space, sample_space
from edgelora.signature import Signature, TextDistribution

COMPLETION_WEIGHT = 0.5
FIELDS = ("prompt", "completion")
N_SLICES = 64
SINKHORN_REGULARISATION = 0.5  # of the median cost in the bank; at 0.1 outliers did not converge
Array = NDArray[np.float64]
FieldDistance = Callable[[Space, TextDistribution, TextDistribution], float]


def fields_used(target: Signature, others: Sequence[Signature]) -> tuple[str, ...]:
    """The text fields that a comparison can use: ("prompt",) or ("prompt", "completion")."""
    if target.completion is None or all(other.completion is None for other in others):
        return ("prompt",)
    return ("prompt", "completion")


def field_shares(used: Sequence[str], completion_weight: float) -> dict[str, float]:
    """What each field that is used counts; they sum to 1."""
    if tuple(used) == ("prompt",):
        return {"prompt": 1.0}
    return {"prompt": 1.0 - completion_weight, "completion": completion_weight}


def bank_fields(others: Sequence[Signature]) -> dict[str, list[TextDistribution | None]]:
    """Each field that any of k signatures has: k distributions, None where it is missing.

    Raises:
        ValueError: there is no signature.
    """
    if not others:
        raise ValueError("a comparison needs at least one signature")
    fields = {name: [other.fields().get(name) for other in others] for name in FIELDS}
    return {name: some for name, some in fields.items() if any(some)}


def cosine(
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    completion_weight: float = COMPLETION_WEIGHT,
) -> Array:
    """1 - cosine of the centred and whitened means, in [0, 2]; 1 where a mean is the bank's."""
    return MomentBank(others, completion_weight).cosine(target)


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
    return MomentBank(others, completion_weight).bures(target)


class MomentBank:
    """The whitened moments of a bank, made once: then a dataset is compared in milliseconds.

    Raises:
        ValueError: no signature.
    """

    def __init__(
        self, others: Sequence[Signature], completion_weight: float = COMPLETION_WEIGHT
    ) -> None:
        self._others = others
        self._weight = completion_weight
        self._banks = {name: _Gaussians(some) for name, some in bank_fields(others).items()}

    def cosine(self, target: Signature) -> Array:
        """See `cosine`; (k,)."""
        return self._combined(target, _Gaussians.cosine)

    def bures(self, target: Signature) -> Array:
        """See `bures`; (k,)."""
        return self._combined(target, _Gaussians.bures)

    def _combined(
        self, target: Signature, measured: Callable[[_Gaussians, TextDistribution], Array]
    ) -> Array:
        used = fields_used(target, self._others)
        found = {name: measured(self._banks[name], target.fields()[name]) for name in used}
        return _weighted(found, self._weight)


class _Gaussians:
    """One text field of a bank, whitened; adapters without it get NaN."""

    def __init__(self, fields: Sequence[TextDistribution | None]) -> None:
        known = [field for field in fields if field is not None]
        self.space = moment_space(known)
        self._there = np.array([field is not None for field in fields])
        means = np.stack([field.mean.astype(np.float64) for field in known])
        self._means = self.space.whiten(means - self.space.centre)
        q = max(len(field.variances) for field in known)
        factors = np.zeros((len(known), q, means.shape[1]))  # rows of zeros add nothing
        for padded, field in zip(factors, known, strict=True):
            padded[: len(field.variances)] = field.factor()
        self._factors = self.space.whiten(factors.reshape(-1, means.shape[1])).reshape(
            factors.shape
        )
        self._residuals = np.array([self.space.residual_deviation(field) for field in known])

    def cosine(self, own: TextDistribution) -> Array:
        x = self.space.mean(own)
        lengths = np.linalg.norm(self._means, axis=1) * np.linalg.norm(x)
        cosines = np.divide(self._means @ x, lengths, out=np.zeros(len(lengths)), where=lengths > 0)
        return self._spread(1.0 - cosines)

    def bures(self, own: TextDistribution) -> Array:
        shifts = ((self._means - self.space.mean(own)) ** 2).sum(axis=1)
        squared = bures_squared(self._factors, self.space.factor(own))
        residuals = self._residuals - self.space.residual_deviation(own)
        return self._spread(np.sqrt(shifts + squared + residuals**2))

    def _spread(self, values: Array) -> Array:
        spread = np.full(len(self._there), np.nan)
        spread[self._there] = values
        return spread


def bures_squared(a: Array, b: Array) -> Array:
    """Squared Bures distance between the covariances a.T @ a and b.T @ b.

    tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, the last trace being the sum of the singular values of
    a @ b.T (Bhatia, Jain and Lim, 2019, "On the Bures-Wasserstein distance", equation 4).

    Args:
        a: (..., q, d) float64, one or many; rows of zeros add nothing.  b: (q', d) float64.

    Returns:
        (...) float64.
    """
    products = a @ b.T
    overlap = np.linalg.svd(products, compute_uv=False).sum(axis=-1) if products.size else 0.0
    traces = (a**2).sum(axis=(-2, -1)) + (b**2).sum()
    return np.asarray(np.maximum(traces - 2.0 * overlap, 0.0))


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
    with np.errstate(over="ignore"):  # steps on the way, where points are very far apart
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
    found, fields = {}, bank_fields(others)
    for name in fields_used(target, others):
        own, theirs = target.fields()[name], fields[name]
        space = open_space([field for field in theirs if field is not None])
        found[name] = np.array(
            [np.nan if field is None else between(space, own, field) for field in theirs]
        )
    return _weighted(found, completion_weight)


def _weighted(found: Mapping[str, Array], completion_weight: float) -> Array:
    """The weighted sum of the fields' distances, NaN taken as the mean of those that are known."""
    shares = field_shares(tuple(found), completion_weight)
    return np.asarray(
        sum(
            shares[name] * np.where(np.isnan(values), np.nanmean(values), values)
            for name, values in found.items()
        )
    )
