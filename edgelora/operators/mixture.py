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
from edgelora.operators.whitening import sample_space
from edgelora.signature import Signature, TextDistribution

REGULARISATION = 0.1  # of the spread of the objective's slopes at the uniform mixture
GAP = 1e-9
MAX_STEPS = 50_000
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
    """Minimise w' gram w - 2 cross' w + lambda sum w log w on the simplex by mirror descent.

    Each step minimises the linearised quadratic, the entropy itself and KL(w || previous) / eta;
    eta = 1 / (2 max |gram|) makes it a descent step (Lu, Freund and Nesterov, 2018,
    arXiv:1610.05708). It stops at the wanted duality gap, or after 50,000 steps.

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
    k = len(cross)
    eta = 0.5 / max(float(np.abs(gram).max()), 1e-300)
    logs = np.full(k, -np.log(k))
    best, best_gap = np.exp(logs), np.inf
    for _ in range(MAX_STEPS):
        weights = np.exp(logs)
        slopes = 2.0 * (gram @ weights - cross)
        full = slopes + regularisation * logs
        gap = _gap(weights, slopes, full, regularisation)
        if gap < best_gap:
            best, best_gap = weights, gap
        if gap < wanted_gap:
            break
        logs = (logs - eta * slopes) / (1.0 + eta * regularisation)
        logs -= _log_sum_exp(logs)
    return best / best.sum(), float(best_gap)


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
        self._space = sample_space(known)
        blocks = [self._space.points(field) for field in known]
        self._points = np.concatenate(blocks)
        self._starts = np.cumsum([0, *(len(block) for block in blocks[:-1])])
        self._sizes = np.array([len(block) for block in blocks], np.float64)
        self._shares = np.zeros((len(fields), len(known)))
        self._shares[[field is not None for field in fields]] = np.eye(len(known))
        self._shares[[field is None for field in fields]] = 1.0 / len(known)
        self.gram = self._shares @ self._between() @ self._shares.T if gram is None else gram

    def compare(self, field: TextDistribution) -> tuple[Array, float]:
        """(k,) to each adapter, and to itself."""
        points = self._space.points(field)
        sums = self._sums(points, self._points, self._starts)
        own = float(rbf(points, points, self._space.median_squared).mean())
        return self._shares @ (sums / (len(points) * self._sizes)), own

    def _between(self) -> Array:
        means = np.zeros((len(self._sizes), len(self._sizes)))
        ends = np.append(self._starts[1:], len(self._points))
        for i, (start, end) in enumerate(zip(self._starts, ends, strict=True)):
            tail, starts = self._points[start:], self._starts[i:] - start
            sums = self._sums(self._points[start:end], tail, starts)
            means[i, i:] = means[i:, i] = sums / (self._sizes[i] * self._sizes[i:])
        return means

    def _sums(self, block: Array, points: Array, starts: NDArray[np.int64]) -> Array:
        kernel = rbf(block, points, self._space.median_squared)
        return np.asarray(np.add.reduceat(kernel.sum(axis=0), starts))


def _gap(weights: Array, slopes: Array, full: Array, regularisation: float) -> float:
    """An upper bound on objective - minimum, from the convex quadratic's tangent.

    For every v: objective(v) >= tangent(v) + lambda sum v log v, whose minimum is known.
    """
    if regularisation == 0.0:
        return float(weights @ slopes - slopes.min())
    lowest = -regularisation * _log_sum_exp(-slopes / regularisation)
    return float(weights @ full - lowest)


def _log_sum_exp(values: Array) -> float:
    peak = float(values.max())
    return peak + float(np.log(np.exp(values - peak).sum()))
