"""The surrogate linearised again at the best trial: steps on coefficients, without gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgelora.build.alone import measure_slopes
from edgelora.build.crossing import owners_of
from edgelora.build.search import Search, release
from edgelora.build.trials import Trial, least_loss
from edgelora.engine.hidden import CompletionStates, completion_states
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import count_tokens, mean_loss, open_for, score
from edgelora.operators import surrogate

Array = NDArray[np.float64]

PENALTIES = (3.0, 1.0, 0.3)
# Long enough to tell a slope from the noise of a quantised base, short enough to stay near.
DELTA = 0.1
_N_CHECKS = 3


def relinearised(search: Search, trials: Sequence[Trial]) -> Trial:
    """The surrogate linearised at the best trial, again and again; the best that a pass confirms.

    Of each step a real pass takes the whole or a part; when none helps, or the budget allows no
    more, the search ends. Where the budget does not suffice for every adapter, those of the
    largest coefficients are varied.
    """
    best = least_loss(trials)
    for number in range(2, search.n_linearisations + 1):
        step = _linearised_step(search, best)
        found = None if step is None else _checked(search, f"surrogate, {number}x", best, step)
        if found is None:
            break
        best = found
    return best


def _linearised_step(search: Search, best: Trial) -> tuple[Array, ...] | None:
    """What the surrogate adds to the coefficients of a trial, and to those of each of its folds.

    Returns:
        (k,) each; None if the budget allows no linearisation, or states are not finite.
    """
    cost = count_tokens(search.examples)
    n = min(len(best.weights), (search.budget.left - search.n_spared) // cost - 1 - _N_CHECKS)
    if n < 1:
        search.budget.was_short = True
        return None
    search.budget.take((1 + n) * cost)
    order = np.argsort(-np.abs(best.weights), kind="stable")
    positions = sorted(int(i) for i in order[:n])
    here, slopes = _slopes(search, best, positions)
    if not (np.isfinite(here.hidden).all() and np.isfinite(slopes).all()):
        return None
    return steps_of(search, best, positions, here, slopes, _penalty(search, here, slopes))


def steps_of(
    search: Search,
    best: Trial,
    positions: Sequence[int],
    here: CompletionStates,
    slopes: NDArray[np.float32],
    penalty: float,
) -> tuple[Array, ...]:
    """The step from a trial, and the step of each fold from its own point, without its examples.

    The point of the linearisation has seen all examples, the coefficients of a fold have not.

    Args:
        here, slopes: states at the trial, and along the adapters at `positions`.

    Returns:
        (k,) each.
    """
    assert search.measured is not None
    starts = [(np.zeros(len(positions)), np.zeros(len(here.targets), bool))]
    starts += [
        ((weights - best.weights)[list(positions)], out)
        for weights, out in zip(best.folds, search.left_out, strict=True)
    ]
    found = []
    for start, out in starts:
        step = surrogate.fit_step(
            here.hidden, slopes, here.targets, search.measured.head,
            start=start, penalty=penalty, seen=~out,
        ) - start  # fmt: skip
        found.append(search.pool.spread(positions, step))
    return tuple(found)


def _penalty(search: Search, here: CompletionStates, slopes: NDArray[np.float32]) -> float:
    """The best by the surrogate's own cross-validation; the largest with one example."""
    if len(search.examples) < 2:
        return PENALTIES[0]
    assert search.measured is not None
    losses = surrogate.held_out_losses(
        here.hidden, slopes, here.targets, search.measured.head, owners_of(search.examples),
        start=np.zeros(len(slopes)), penalties=PENALTIES,
    )  # fmt: skip
    return PENALTIES[int(losses.argmin())]


def _slopes(
    search: Search, best: Trial, positions: Sequence[int]
) -> tuple[CompletionStates, NDArray[np.float32]]:
    """States at a trial, and their slopes along some adapters, (n, t, d)."""
    stage = "measuring adapters at the best"
    with open_for(search.model, search.examples, hidden=True) as context:
        context.apply(best.weighted())
        here = completion_states(context, search.examples)
        slopes = measure_slopes(
            context,
            [search.pool.paths[i] for i in positions],
            search.examples,
            here,
            lambda done, total: search.progress(stage, done, total),
            at=best.weighted(),
            weight=DELTA,
            folder=search.folder,
        )
        release(context, best.path)
    return here, slopes


def _checked(search: Search, name: str, best: Trial, steps: tuple[Array, ...]) -> Trial | None:
    """The trial of a step, or of the part of it, that a real pass finds better; None: no part."""
    step, *folded = steps
    cost = count_tokens(search.examples)
    made = search.make(name, best.weights + step)
    with open_for(search.model, search.examples) as context:

        def loss(fraction: float) -> float:
            if not search.budget.take(cost):
                return math.inf
            context.apply(_between(best, made, fraction))
            return mean_loss(score(context, search.examples))

        fraction, found = surrogate.shrink(loss, best.loss)
        release(context, best.path, made.path)
    if fraction == 0.0:
        return None
    if fraction < 1.0:
        name = f"{name}, shrunk"
        made = search.make(name, best.weights + fraction * step)
    folds = tuple(w + fraction * s for w, s in zip(best.folds, folded, strict=True))
    return replace(made, loss=found, folds=folds)


def _between(one: Trial, other: Trial, fraction: float) -> list[WeightedAdapter]:
    """The sum (1 - fraction) one + fraction other, for which there need be no file."""
    return [
        WeightedAdapter(file.path, file.weight * share)
        for trial, share in ((one, 1.0 - fraction), (other, fraction))
        for file in trial.weighted()
    ]
