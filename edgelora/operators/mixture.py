"""Mixture matching: the mixture of the bank's datasets that resembles the user's most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.operators.embedding_distances import COMPLETION_WEIGHT, fields_used, rbf
from edgelora.operators.whitening import sample_space
from edgelora.signature import Signature

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
    if not others:
        raise ValueError("mixture matching needs at least one signature")
    gram, cross, own = kernel_means(target, others, completion_weight)
    if regularisation is None:
        slopes = 2.0 * (gram.mean(axis=1) - cross)
        regularisation = strength * float(slopes.std())
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


def solve(gram: Array, cross: Array, regularisation: float) -> tuple[Array, float]:
    """Minimise w' gram w - 2 cross' w + lambda sum w log w on the simplex by mirror descent.

    Each step minimises the linearised quadratic, the entropy itself and KL(w || previous) / eta;
    eta = 1 / (2 max |gram|) makes it a descent step (Lu, Freund and Nesterov, 2018,
    arXiv:1610.05708). It stops at a duality gap of 1e-9, or after 50,000 steps.

    Args:
        gram: (k, k) positive semidefinite.  cross: (k,).

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
        if gap < GAP:
            break
        logs = (logs - eta * slopes) / (1.0 + eta * regularisation)
        logs -= _log_sum_exp(logs)
    return best / best.sum(), float(best_gap)


def kernel_means(
    target: Signature, others: Sequence[Signature], completion_weight: float
) -> tuple[Array, Array, float]:
    """Mean kernels: (k, k) between the others, (k,) target to others, target to itself."""
    used = fields_used(target, others)
    shares = {"prompt": 1.0 - completion_weight, "completion": completion_weight}
    if used == ("prompt",):
        shares["prompt"] = 1.0
    k = len(others)
    gram, cross, own = np.zeros((k, k)), np.zeros(k), 0.0
    for name in used:
        fields = [other.fields().get(name) for other in others]
        known = [field for field in fields if field is not None]
        space = sample_space(known)
        blocks = [space.points(field) for field in [*known, target.fields()[name]]]
        means = _block_means(blocks, space.median_squared)
        # Unknown completions: the average of the known ones, as a mixture of datasets itself.
        rows = np.zeros((k + 1, len(blocks)))
        rows[-1, -1] = 1.0
        position = 0
        for i, field in enumerate(fields):
            if field is None:
                rows[i, :-1] = 1.0 / len(known)
            else:
                rows[i, position] = 1.0
                position += 1
        full = rows @ means @ rows.T
        gram += shares[name] * full[:-1, :-1]
        cross += shares[name] * full[-1, :-1]
        own += shares[name] * float(full[-1, -1])
    return gram, cross, own


def _block_means(blocks: Sequence[Array], median_squared: float) -> Array:
    """The mean kernel between every two blocks of points, symmetric."""
    starts = np.cumsum([0, *(len(block) for block in blocks[:-1])])
    points = np.concatenate(blocks)
    sizes = np.array([len(block) for block in blocks], np.float64)
    means = np.zeros((len(blocks), len(blocks)))
    for i, block in enumerate(blocks):
        tail = points[starts[i] :]
        sums = np.add.reduceat(rbf(block, tail, median_squared).sum(axis=0), starts[i:] - starts[i])
        means[i, i:] = means[i:, i] = sums / (sizes[i] * sizes[i:])
    return means


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
