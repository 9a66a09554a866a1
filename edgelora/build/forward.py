"""Candidates by forward passes at their best scale, and the searches that go on from the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.build.alone import measure_adapters
from edgelora.build.crossing import without
from edgelora.build.linearising import relinearised
from edgelora.build.measuring import SHARE_FOR_ADAPTERS
from edgelora.build.passes import Passes
from edgelora.build.pool import Pool
from edgelora.build.proposals import (
    LOSS_TEMPERATURE,
    find_nearness,
    needs_losses,
    propose,
    shortlist,
    warm_start,
)
from edgelora.build.records import DEFAULT_DISTANCE, Options
from edgelora.build.search import N_LINEARISATIONS, Search, release
from edgelora.build.trials import Budget, Trial, least_loss, measure_trial, try_scales_without
from edgelora.datasets.records import Example
from edgelora.engine.context import Context
from edgelora.engine.model import Model
from edgelora.engine.score import TokenisedExample, count_tokens, open_for
from edgelora.errors import EdgeLoRAError
from edgelora.operators import searches
from edgelora.operators.heads import gibbs

Array = NDArray[np.float64]

_SHARE_FOR_FIRST_RUNG = 0.5


def begin_search(
    model: Model,
    pool: Pool,
    examples: Sequence[Example],
    texts: Sequence[TokenisedExample],
    operator: str,
    folder: Path,
    budget: Budget,
    *,
    n_linearisations: int = N_LINEARISATIONS,
    seed: int = 0,
) -> Search:
    """What `build` has measured when it begins to search, for a library call or a benchmark.

    Args:
        examples, texts: the same, as they were read and as token ids.
        budget: embedding the examples is not taken from it.
    """
    with open_for(model, texts, hidden=True) as context:
        nearness = find_nearness(context, pool, examples, DEFAULT_DISTANCE, seed)
        positions, shown = shortlist(pool, texts, nearness, int(SHARE_FOR_ADAPTERS * budget.left))
        if not needs_losses(Options(operator=operator, refine="forward")):
            positions = []
        budget.take((1 + len(positions)) * count_tokens(shown))
        measured = measure_adapters(context, pool, positions, shown, folder=folder)
    return Search(
        model, pool, shown, nearness, measured if positions else None, folder, budget,
        n_linearisations, seed,
    )  # fmt: skip


def find_trials(search: Search, operator: str, trials: list[Trial]) -> None:
    """Fill `trials` with the candidates of an operator, simplest first, each at its best scale.

    "auto" goes on from the best of them with the surrogate linearised again. The budget is kept:
    what it does not allow is left out, and `budget.was_short` says so.

    Raises:
        EdgeLoRAError: the operator lacks its input, or the budget is too small for it.
    """
    _try(search, warm_start(operator), trials)
    if operator in SEARCHES:
        trials[:] = [SEARCHES[operator](search, trials)]
    elif operator == "auto" and search.measured is not None:
        found = relinearised(search, trials)
        if found not in trials:
            trials.append(found)


def halving(search: Search, trials: Sequence[Trial]) -> Trial:
    """Gibbs weights of the adapters that last when the bad ones are dropped after few examples.

    The nearest are the field, if the budget does not allow that every adapter enters.

    Raises:
        EdgeLoRAError: not one adapter could be measured.
    """
    pool, examples = search.pool, search.examples
    first = count_tokens(examples[: searches.N_FIRST])
    n_arms = int(_SHARE_FOR_FIRST_RUNG * search.budget.left) // max(1, first)
    k = len(pool.records)
    distances = search.nearness.distances if search.nearness else np.zeros(k)
    field = np.argsort(distances, kind="stable")[: max(1, n_arms)].tolist()
    with open_for(search.model, search.examples) as context:

        def measure(arm: int, start: int, end: int) -> tuple[Array, Array]:
            search.progress("halving the field, examples", end, len(examples))
            path = pool.paths[field[arm]]
            passes = Passes(context, [path], examples, search.budget)
            nll = passes.nll(np.ones(1), start, end)
            release(context, path)
            return nll, passes.n_tokens[start:end]

        means = searches.successive_halving(measure, len(field), len(examples))
        search.progress("halving the field, examples", len(examples), len(examples))
        if not np.isfinite(means).any():
            raise EdgeLoRAError(
                f"a budget of {search.budget.n_tokens:,} tokens is too small: no adapter could be "
                "measured",
                hint="Give a larger --budget, or fewer or shorter examples.",
            )
        weights = gibbs(means, temperature=LOSS_TEMPERATURE)
        trial = search.make("halving", pool.spread(field, weights))
        return _scaled(search, context, trial)[0]


def coordinate(search: Search, trials: Sequence[Trial]) -> Trial:
    """Steps along the best trial's scale and a few adapters beside it, each a real pass."""
    return _beside(search, trials, "coordinate", searches.along_axes)


def cma(search: Search, trials: Sequence[Trial]) -> Trial:
    """CMA-ES on the same few coefficients."""
    return _beside(search, trials, "cma", partial(searches.cma_es, seed=search.seed))


SEARCHES: dict[str, Callable[[Search, Sequence[Trial]], Trial]] = {
    "relinearised": relinearised,
    "halving": halving,
    "coordinate": coordinate,
    "cma": cma,
}


def _try(search: Search, operator: str, trials: list[Trial]) -> None:
    """Append the operator's candidates, and what they are without each fold."""
    pool, nearness, measured = search.pool, search.nearness, search.measured
    proposals = propose(pool, nearness, measured, operator)
    folded = [
        propose(pool, nearness, without(measured, out) if measured else None, operator)
        for out in search.left_out
    ]
    # All combined before the context is open: each of the two takes memory.
    files = [search.make(name, coefficients) for name, coefficients in proposals]
    with open_for(search.model, search.examples) as context:
        for done, made in enumerate(files):
            search.progress("trying candidates", done, len(proposals))
            trial, scales = _scaled(search, context, made)
            folds = (others[done][1] * s for others, s in zip(folded, scales, strict=True))
            trials.append(replace(trial, folds=tuple(folds)))
    search.progress("trying candidates", len(proposals), len(proposals))


def _scaled(search: Search, context: Context, trial: Trial) -> tuple[Trial, list[float]]:
    """The trial at its best scale, and the best without the examples of each fold."""
    left_out = search.examples_left_out
    try:
        return try_scales_without(context, trial, search.examples, search.budget, left_out)
    finally:
        release(context, trial.path)


def _beside(
    search: Search,
    trials: Sequence[Trial],
    name: str,
    run: Callable[[searches.Loss, Array], searches.Found],
) -> Trial:
    """Vary the scale of the best trial, and what is added of the adapters of least loss alone.

    The best trial stays where the file of what was found, cut to its rank, is worse.
    """
    assert search.measured is not None
    best, pool, measured = least_loss(trials), search.pool, search.measured
    order = np.argsort(measured.losses, kind="stable")
    others = [measured.positions[i] for i in order]
    others = [i for i in others if pool.paths[i] != best.path][: searches.MAX_VARIABLES - 1]
    files = [best.path, *(pool.paths[i] for i in others)]
    start = np.array([best.candidate.scale, *np.zeros(len(others))])
    with open_for(search.model, search.examples) as context:
        passes = Passes(context, files, search.examples, search.budget)
        n_done, stage = 0, f"{name} search, passes"

        def loss(point: Array) -> float:
            nonlocal n_done
            n_done += 1
            search.progress(stage, n_done, searches.MAX_MEASURED)
            return passes.loss(point)

        try:
            found = run(loss, start)
        except searches.Spent:
            found = searches.Found(start, best.loss, 0)
        search.progress(stage, searches.MAX_MEASURED, searches.MAX_MEASURED)
        release(context, *files)
        coefficients = best.candidate.coefficients * found.point[0]
        coefficients = coefficients + pool.spread(others, found.point[1:])
        trial = replace(search.make(name, coefficients), loss=found.loss)
        trial = measure_trial(context, trial, search.examples, search.budget)
        release(context, trial.path)
    return best if trial.loss > best.loss else trial
