"""Searches by measured losses alone: halving a field of adapters, along axes, and CMA-ES.

Each takes a function that measures and may end at any time: when the function raises `Spent`, the
best that was measured is the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.operators.arbiter import paired_difference

Array = NDArray[np.float64]
Loss = Callable[[Array], float]
MAX_MEASURED = 80
N_FIRST = 4  # examples of the first rung of a halving
MAX_VARIABLES = 8  # CMA-ES learns a covariance of so many with the few passes there are


class Spent(Exception):
    """There is nothing left to measure with."""


@dataclass(frozen=True, eq=False)
class Found:
    """The best point of a search.

    Attributes:
        point: (k,) float64.
        loss: there.
        n_measured: points that were measured.
    """

    point: Array
    loss: float
    n_measured: int


def successive_halving(
    measure: Callable[[int, int, int], tuple[Array, Array]],
    n_arms: int,
    n_examples: int,
    *,
    n_first: int = N_FIRST,
    n_kept: int = MAX_VARIABLES,
) -> Array:
    """Mean losses of the adapters that last, (k,) nats a token; +inf for those that were dropped.

    All are measured on the first few examples; the better half goes on with twice as many, until
    `n_kept` are left or the examples end (Jamieson and Talwalkar, arXiv:1502.07943, algorithm 1,
    with a fixed number of examples in the place of a budget). Those that are left see all.

    Args:
        measure: (arm, first example, end) to the summed losses of these examples, and their
            token counts, each (end - first,).
        n_first: examples of the first rung.
        n_kept: arms that are not halved any more.

    Raises:
        ValueError: no arm, or no example.
    """
    if n_arms < 1 or n_examples < 1:
        raise ValueError(f"{n_arms} arms and {n_examples} examples")
    alive, means = list(range(n_arms)), np.full(n_arms, np.inf)
    sums, tokens = np.zeros(n_arms), np.zeros(n_arms)
    first, end = 0, min(n_first, n_examples)
    while alive:
        try:
            for arm in alive:
                nll, counts = measure(arm, first, end)
                sums[arm] += float(np.sum(nll))
                tokens[arm] += float(np.sum(counts))
        except Spent:
            break
        means = np.full(n_arms, np.inf)
        means[alive] = sums[alive] / tokens[alive]
        if end == n_examples:
            break
        best = np.argsort(means, kind="stable")
        alive = sorted(int(i) for i in best[: max(min(n_kept, len(alive)), len(alive) // 2)])
        means[[i for i in range(n_arms) if i not in alive]] = np.inf
        first, end = end, n_examples if len(alive) <= n_kept else min(2 * end, n_examples)
    return means


def along_axes(
    loss: Loss,
    start: Array,
    *,
    step: float = 0.4,
    least_step: float = 0.1,
    max_measured: int = MAX_MEASURED,
) -> Found:
    """Coordinate search: a step either way along each axis in turn, halved when none helps.

    (Compass search: Kolda, Lewis and Torczon, SIAM Review 2003, section 3.)

    Args:
        start: (k,), measured first.

    Raises:
        Spent: not even the start could be measured.
    """
    point = np.array(start, np.float64)
    best, n_measured = loss(point), 1
    try:
        while step >= least_step:
            improved = False
            for axis in range(len(point)):
                for sign in (1.0, -1.0):
                    if n_measured == max_measured:
                        return Found(point, best, n_measured)
                    tried = point.copy()
                    tried[axis] += sign * step
                    found, n_measured = loss(tried), n_measured + 1
                    if found < best:
                        point, best, improved = tried, found, True
                        break
            step = step if improved else step / 2
    except Spent:
        pass
    return Found(point, best, n_measured)


def cma_es(
    loss: Loss, start: Array, *, sigma: float = 0.2, max_measured: int = MAX_MEASURED, seed: int = 0
) -> Found:
    """CMA-ES (Hansen and Ostermeier, 2001; the `cma` package) from a start.

    Args:
        start: (k,), measured first; with k = 1 there is no covariance to learn, and the search is
            that along its axis.
        sigma: standard deviation of the first steps.

    Raises:
        Spent: not even the start could be measured.
    """
    if len(start) == 1:
        return along_axes(loss, start, step=2 * sigma, max_measured=max_measured)
    point = np.array(start, np.float64)
    best, n_measured = loss(point), 1
    strategy = _strategy(point, sigma, seed)
    try:
        while not strategy.stop() and n_measured + strategy.popsize <= max_measured:
            points = strategy.ask()
            losses = []
            for tried in points:
                found, n_measured = loss(np.asarray(tried, np.float64)), n_measured + 1
                losses.append(found)
                if found < best:
                    point, best = np.array(tried, np.float64), found
            strategy.tell(points, losses)
    except Spent:
        pass
    return Found(point, best, n_measured)


def is_hopeless(nll: Array, best: Array, n_tokens: Array, *, n_errors: float = 2.0) -> bool:
    """Whether a combination is worse than the best by more than the noise, on what both have seen.

    Args:
        nll, best, n_tokens: (n,) summed losses of the same examples, and their token counts.
        n_errors: standard errors of the paired difference.
    """
    difference, error = paired_difference(nll, best, n_tokens)
    return difference > n_errors * error


def _strategy(start: Array, sigma: float, seed: int) -> Any:
    """A CMA-ES that draws from a generator of its own: the package's default reseeds numpy's."""
    import cma

    rng = np.random.default_rng(seed)
    options = {
        "randn": lambda *shape: rng.standard_normal(shape),
        "seed": float("nan"),
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(start, sigma, options)
