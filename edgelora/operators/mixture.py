"""Mixture matching: the mixture of the bank's datasets that resembles the user's most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.operators.embedding_distances import (
    COMPLETION_WEIGHT,
    bank_fields,
    field_shares,
    fields_used,
    rbf,
)
from edgelora.operators.whitening import whitened_samples
from edgelora.signature import Signature, TextDistribution

REGULARISATION = 0.1  # of the spread of the objective's slopes at the uniform mixture
GAP = 1e-9
MAX_STEPS = 50_000
STEPS_OF_A_RUN = 200
COLUMNS = 1024
FAR = 1e6  # in squared distances of the widest kernel: 1e-10 of the exponent is rounding
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Match:
    """The result of mixture matching.

    Attributes:
        coefficients: (k,) float64 on the simplex.
        mmd: MMD between the dataset and the mixture.
        mmds: (k,) MMD between the dataset and each adapter's dataset, to compare with.
        regularisation: the lambda that was used.
        gap: bound on how far the objective is from its minimum.
    """

    coefficients: Array
    mmd: float
    mmds: Array
    regularisation: float
    gap: float


def match(
    target: Signature,
    others: Sequence[Signature],
    *,
    regularisation: float | None = None,
    strength: float = REGULARISATION,
    completion_weight: float = COMPLETION_WEIGHT,
) -> Match:
    """Coefficients that minimise MMD^2(P_target, sum w_i P_i) + lambda sum w log w on the simplex.

    Unlike a softmin of single distances it sees redundancy: two equal datasets share one weight.
    The kernel is that of `rbf_mmd`; an adapter without completions is taken to have the average
    ones. Convex, since V-statistics keep the Gram matrix positive semidefinite.

    Args:
        regularisation: lambda; by default `strength` (a tenth) of the spread of the slopes at the
            uniform mixture, so that it needs no unit.

    Raises:
        ValueError: there is no other signature, or lambda is negative.
    """
    return MixtureBank(others, completion_weight).match(target, regularisation, strength=strength)


def mixture(
    target: Signature,
    others: Sequence[Signature],
    *,
    temperature: float | None = None,
    strength: float = REGULARISATION,
    completion_weight: float = COMPLETION_WEIGHT,
) -> Array:
    """The coefficients of `match` alone, (k,) float64; `temperature` is its lambda."""
    return match(
        target,
        others,
        regularisation=temperature,
        strength=strength,
        completion_weight=completion_weight,
    ).coefficients


def rate_of(gram: Array, cross: Array, strength: float) -> float:
    """lambda: `strength` of the spread of the slopes at the uniform mixture."""
    slopes = 2.0 * (gram.mean(axis=1) - cross)
    return strength * float(slopes.std())


def solve(
    gram: Array, cross: Array, regularisation: float, *, wanted_gap: float = GAP
) -> tuple[Array, float]:
    """Minimise w' gram w - 2 cross' w + lambda sum w log w on the simplex.

    Accelerated mirror descent (Nesterov, 2013, "Gradient methods for minimizing composite
    functions", method 4.9, with KL for the squared distance): about sqrt(max |gram| / lambda) steps
    for each digit. It begins anew from where it is every 200 steps, which is what makes the weights
    of adapters that do not help vanish where lambda is 0 or tiny. It stops at the wanted duality
    gap, or after 50,000 steps.

    Args:
        gram: (k, k) positive semidefinite.  cross: (k,).
        wanted_gap: KL(w || w*) is at most the gap divided by lambda.

    Returns:
        w (k,) float64, and the duality gap that was reached.

    Raises:
        ValueError: lambda is negative.
    """
    if regularisation < 0:
        raise ValueError(f"lambda must not be negative, but is {regularisation}")
    weights = np.full(len(cross), 1.0 / len(cross))
    run = _Descent(gram, cross, regularisation, weights)
    best, best_gap = weights, run.gap()
    for step in range(1, MAX_STEPS + 1):
        if best_gap < wanted_gap:
            break
        run.step()
        gap = run.gap()
        if gap < best_gap:
            best, best_gap = run.weights, gap
        if step % STEPS_OF_A_RUN == 0 or run.converged:
            run = _Descent(gram, cross, regularisation, run.weights)
    return best / best.sum(), float(best_gap)


class _Descent:
    """Accelerated mirror descent from one point on: `weights` (k,) after each step."""

    def __init__(self, gram: Array, cross: Array, regularisation: float, weights: Array) -> None:
        self._gram, self._cross, self._rate = gram, cross, regularisation
        self._smoothness = max(2.0 * float(np.abs(gram).max()), 1e-300)
        self._logs = np.log(np.maximum(weights, 1e-300))
        self._slopes = np.zeros(len(weights))  # all slopes so far, as they were weighted
        self._mass = 0.0  # the sum of those weights
        self.weights = weights
        self._product = self._product_ahead = gram @ weights

    def step(self) -> None:
        """One step: one product with gram, at the point that the slopes so far lead to."""
        steadiness = 1.0 + self._rate * self._mass  # strong convexity of what is minimised
        root = steadiness**2 + 4.0 * self._smoothness * self._mass * steadiness
        added = (steadiness + math.sqrt(root)) / (2.0 * self._smoothness)
        self._mass += added
        share = added / self._mass
        looked_at = (1.0 - share) * self._product + share * self._product_ahead
        self._slopes += added * 2.0 * (looked_at - self._cross)
        logs = (self._logs - self._slopes) / (1.0 + self._rate * self._mass)
        ahead = np.exp(logs - logs.max())
        ahead /= ahead.sum()
        self._product_ahead = self._gram @ ahead
        self.weights = (1.0 - share) * self.weights + share * ahead
        self._product = (1.0 - share) * self._product + share * self._product_ahead

    @property
    def converged(self) -> bool:
        """Whether further steps from this start would move the last bits only."""
        return self._rate * self._mass > 1e16

    def gap(self) -> float:
        """See `_gap`."""
        slopes = 2.0 * (self._product - self._cross)
        return _gap(self.weights, slopes, self._rate)


def kernel_means(
    target: Signature, others: Sequence[Signature], completion_weight: float
) -> tuple[Array, Array, float]:
    """Mean kernels: (k, k) between the others, (k,) target to others, target to itself."""
    return MixtureBank(others, completion_weight).kernel_means(target)


class MixtureBank:
    """The mean kernels between a bank's datasets, made once: k^2 of them, each of m^2 points.

    Args:
        grams: what `grams` of the same bank was, to be spared their making.

    Raises:
        ValueError: there is no signature.
    """

    def __init__(
        self,
        others: Sequence[Signature],
        completion_weight: float = COMPLETION_WEIGHT,
        *,
        grams: Mapping[str, Array] | None = None,
    ) -> None:
        self._others = others
        self._weight = completion_weight
        known = grams or {}
        self._banks = {
            name: _Kernels(some, known.get(name)) for name, some in bank_fields(others).items()
        }

    @property
    def grams(self) -> dict[str, Array]:
        """By field, the mean kernels between every two adapters, (k, k)."""
        return {name: bank.gram for name, bank in self._banks.items()}

    def match(
        self,
        target: Signature,
        regularisation: float | None = None,
        *,
        strength: float = REGULARISATION,
    ) -> Match:
        """See `match`."""
        gram, cross, own = self.kernel_means(target)
        if regularisation is None:
            regularisation = rate_of(gram, cross, strength)
        coefficients, gap = solve(gram, cross, regularisation)
        squared = float(coefficients @ gram @ coefficients - 2.0 * cross @ coefficients + own)
        squares = np.diag(gram) - 2.0 * cross + own
        return Match(
            coefficients=coefficients,
            mmd=math.sqrt(max(squared, 0.0)),
            mmds=np.sqrt(np.maximum(squares, 0.0)),
            regularisation=regularisation,
            gap=gap,
        )

    def kernel_means(self, target: Signature) -> tuple[Array, Array, float]:
        """See `kernel_means`."""
        used = fields_used(target, self._others)
        shares = field_shares(used, self._weight)
        k = len(self._others)
        gram, cross, own = np.zeros((k, k)), np.zeros(k), 0.0
        for name in used:
            bank = self._banks[name]
            to_bank, to_itself = bank.compare(target.fields()[name])
            gram += shares[name] * bank.gram
            cross += shares[name] * to_bank
            own += shares[name] * to_itself
        return gram, cross, own


class _Kernels:
    """One text field of a bank: mean kernels between every two adapters, `gram` (k, k).

    Unknown completions are the average of the known ones, as a mixture of datasets itself.
    """

    def __init__(
        self, fields: Sequence[TextDistribution | None], gram: Array | None = None
    ) -> None:
        known = [field for field in fields if field is not None]
        self._space, points = whitened_samples(known)
        self._rows, self._columns = exponent_factors(points, self._space.median_squared)
        self._sizes = np.array([len(field.sample) for field in known])
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._shares = np.zeros((len(fields), len(known)))
        self._shares[[field is not None for field in fields]] = np.eye(len(known))
        self._shares[[field is None for field in fields]] = 1.0 / len(known)
        self.gram = self._shares @ self._between() @ self._shares.T if gram is None else gram

    def compare(self, field: TextDistribution) -> tuple[Array, float]:
        """(k,) to each adapter, and to itself."""
        points = self._space.points(field)
        left, _ = exponent_factors(points, self._space.median_squared)
        sums = kernel_sums(left, self._columns, self._starts)
        own = float(rbf(points, points, self._space.median_squared).mean())
        return self._shares @ (sums / (len(points) * self._sizes)), own

    def _between(self) -> Array:
        means = np.zeros((len(self._sizes), len(self._sizes)))
        for i, (start, size) in enumerate(zip(self._starts, self._sizes, strict=True)):
            block = self._rows[start : start + size]
            sums = kernel_sums(block, self._columns[start:], self._starts[i:] - start)
            means[i, i:] = means[i:, i] = sums / (self._sizes[i] * self._sizes[i:])
        return means


def exponent_factors(points: Array, median_squared: float) -> tuple[Array, Array]:
    """(m, p + 2) twice: left(x) @ right(y).T is -|x - y|^2 / (4 median_squared).

    One product for the whole exponent, which cdist would sum value by value.
    """
    scaled = points / math.sqrt(4.0 * median_squared)
    squares = -(scaled**2).sum(axis=1, keepdims=True)
    ones = np.ones_like(squares)
    left = np.concatenate([2.0 * scaled, squares, ones], axis=1)
    return left, np.concatenate([scaled, ones, squares], axis=1)


def kernel_sums(left: Array, right: Array, starts: NDArray[np.int64]) -> Array:
    """The kernel of `rbf`, summed over all of `left` and each run of rows of `right`: (k,).

    A few columns at a time, so that the kernel's values stay in the processor's cache. Where points
    of `right` lie so far from the centre that the product would cancel (a bank whose texts are
    nearly one text: the median distance is tiny), the differences themselves are squared.
    """
    if right[:, -1].min() < -FAR:
        kernel = rbf(left[:, :-2] / 2.0, right[:, :-2], 0.25)
        return np.asarray(np.add.reduceat(kernel.sum(axis=0), starts))
    sums = np.empty(len(right))
    kernel = np.empty((len(left), COLUMNS))
    power = np.empty_like(kernel)
    for at in range(0, len(right), COLUMNS):
        some = right[at : at + COLUMNS]
        wide, narrow = kernel[:, : len(some)], power[:, : len(some)]
        np.exp(np.matmul(left, some.T, out=wide), out=wide)
        np.multiply(wide, wide, out=narrow)
        wide += narrow
        narrow *= narrow
        wide += narrow
        wide.sum(axis=0, out=sums[at : at + COLUMNS])
    return np.asarray(np.add.reduceat(sums, starts)) / 3.0


def _gap(weights: Array, slopes: Array, regularisation: float) -> float:
    """An upper bound on objective - minimum, from the convex quadratic's tangent.

    For every v: objective(v) >= tangent(v) + lambda sum v log v, whose minimum is known.
    """
    if regularisation == 0.0:
        return float(weights @ slopes - slopes.min())
    lowest = -regularisation * _log_sum_exp(-slopes / regularisation)
    logs = np.log(np.maximum(weights, 1e-300))
    return float(weights @ (slopes + regularisation * logs) - lowest)


def _log_sum_exp(values: Array) -> float:
    peak = float(values.max())
    return peak + float(np.log(np.exp(values - peak).sum()))
