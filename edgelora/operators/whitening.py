"""The space in which datasets are compared: centred at the bank's mean, whitened by its spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgelora.signature import TextDistribution

SHRINKAGE = 0.1  # share of the isotropic covariance that is mixed in
N_MEDIAN_POINTS = 512
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Space:
    """An affine map: x -> (x - centre) @ W with W = (rest) I + directions.T diag(gains) directions.

    Attributes:
        centre: (e,) float64; e is d for moments, p for samples.
        directions: (r, e) float64, orthonormal rows.
        gains: (r,) what a direction is scaled by beyond `rest`.
        rest: the scale of everything outside the directions.
        median_squared: median squared distance between whitened points (1 for moments).
    """

    centre: Array
    directions: Array
    gains: Array
    rest: float
    median_squared: float = 1.0

    def whiten(self, rows: Array) -> Array:
        """(n, e) rows, already centred, times W."""
        inside = ((rows @ self.directions.T) * self.gains) @ self.directions
        return np.asarray(self.rest * rows + inside, np.float64)

    def mean(self, field: TextDistribution) -> Array:
        """The whitened mean of a field, (d,)."""
        centred = field.mean.astype(np.float64) - self.centre
        return self.whiten(centred[None]).ravel()

    def factor(self, field: TextDistribution) -> Array:
        """(q, d): its Gram is the whitened low-rank covariance of a field."""
        return self.whiten(field.factor())

    def residual_deviation(self, field: TextDistribution) -> float:
        """Standard deviation of a field outside its directions, whitened, all dimensions added."""
        size = len(self.centre)
        squares = (self.gains + self.rest) ** 2
        mean_square = (squares.sum() + (size - len(squares)) * self.rest**2) / size
        return float(np.sqrt(field.residual_variance * mean_square))

    def points(self, field: TextDistribution) -> Array:
        """The whitened sample of a field, (m, p)."""
        return self.whiten(field.points() - self.centre)


def moment_space(fields: Sequence[TextDistribution]) -> Space:
    """The space of means and covariances of a bank, whitened by its total covariance.

    Total covariance: that of the means plus the mean of the covariances, each dataset counting
    once, shrunk towards the isotropic one of equal trace (as Ledoit and Wolf, 2004, with a fixed
    share).
    """
    means = np.stack([field.mean.astype(np.float64) for field in fields])
    centre = means.mean(axis=0)
    spread = np.concatenate([means - centre, *(field.factor() for field in fields)])
    residual = float(np.mean([field.residual_variance for field in fields]))
    return _whitened(centre, spread / np.sqrt(len(fields)), residual)


def sample_space(fields: Sequence[TextDistribution]) -> Space:
    """The projected space of the samples of a bank, whitened by their pooled covariance."""
    return whitened_samples(fields)[0]


def whitened_samples(fields: Sequence[TextDistribution]) -> tuple[Space, Array]:
    """The space of `sample_space`, and the samples of all fields in it, one after the other."""
    points = [field.points() for field in fields]
    centre = np.mean([x.mean(axis=0) for x in points], axis=0)
    shares = np.concatenate([np.full(len(x), len(x) * len(fields)) for x in points])
    centred = np.concatenate(points) - centre
    space = _whitened(centre, centred / np.sqrt(shares)[:, None], 0.0)
    white = space.whiten(centred)
    return replace(space, median_squared=_median_squared(white)), white


def _whitened(centre: Array, spread: Array, residual: float) -> Space:
    """The space whose covariance is spread.T @ spread + residual / e on the diagonal, shrunk."""
    from scipy.linalg import eigh

    e = len(centre)
    isotropic = (float((spread**2).sum()) + residual) / e
    if isotropic == 0.0:  # a bank of one text: there is no spread to measure in
        return Space(centre, np.zeros((0, e)), np.zeros(0), 1.0)
    wide = len(spread) < e
    values, vectors = eigh(spread @ spread.T if wide else spread.T @ spread)
    kept = values > 1e-10 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    directions = (vectors.T @ spread) / np.sqrt(values)[:, None] if wide else vectors.T
    floor = (1.0 - SHRINKAGE) * residual / e + SHRINKAGE * isotropic
    rest = 1.0 / np.sqrt(floor)
    gains = 1.0 / np.sqrt((1.0 - SHRINKAGE) * values + floor) - rest
    return Space(centre, directions, gains, float(rest))


def _median_squared(points: Array) -> float:
    from scipy.spatial.distance import pdist

    some = points[:: max(1, len(points) // N_MEDIAN_POINTS)][:N_MEDIAN_POINTS]
    squares = pdist(some, "sqeuclidean")
    positive = squares[squares > 0]
    return float(np.median(positive)) if len(positive) else 1.0
