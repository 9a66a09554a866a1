"""Candidates compared with the base on examples that they were not found with, and the choice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.build.crossing import assign_folds, count_crossed_tokens
from edgelora.build.search import release
from edgelora.build.trials import Trial, make_trial, score_trial, settled
from edgelora.build.work import MOST_COMPARED, Parts, Work, count_compared, count_compared_tokens
from edgelora.engine.context import Context
from edgelora.engine.score import Score, TokenisedExample, count_tokens, mean_loss
from edgelora.errors import NoImprovement
from edgelora.operators import arbiter

_SAME = 1e-3


@dataclass(frozen=True, eq=False)
class Choice:
    """What is written, and the scores that it was chosen by.

    Attributes:
        scores, base: of the chosen trial and of the base, on the same examples.
    """

    trial: Trial
    verdict: arbiter.Verdict
    scores: list[Score]
    base: list[Score]


def choose(
    work: Work,
    context: Context,
    trials: Sequence[Trial],
    parts: Parts,
    shown: Sequence[TokenisedExample],
    folder: Path,
) -> Choice:
    """The arbiter's choice; the best candidate if --force overrules it.

    It is made on the selection part; without one each trial is scored on every fold of the examples
    `shown` with the coefficients that were found without that fold.

    Raises:
        NoImprovement: the base is best and force is off.
    """
    examples = list(shown) if parts.is_crossed else parts.selection
    _settle(work, parts, examples, len(trials))
    base, rows = score_trial(context, None, examples), []
    for done, trial in enumerate(trials):
        work.listener.progress("comparing with the base", done, len(trials))
        if parts.is_crossed:
            rows.append(cross_score(context, trial, examples, work.pool.paths, folder))
        else:
            rows.append(score_trial(context, trial, examples))
    work.listener.progress("comparing with the base", len(trials), len(trials))
    verdict = arbiter.choose(
        [trial.candidate for trial in trials],
        [[s.nll for s in row] for row in rows],
        [s.n_tokens for s in base],
        [s.nll for s in base],
    )
    position = verdict.position
    if position is None:
        position = min(range(len(trials)), key=lambda i: mean_loss(rows[i]))
        _insist(work, parts, len(examples), verdict)
    return Choice(trials[position], verdict, rows[position], base)


def contenders(work: Work, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that are worth comparing: all, or those of least loss where time is short.

    Of those that there were no tokens to measure the later ones: they come from measured losses.
    """
    if not work.is_cut:
        return list(trials)

    def rank(i: int) -> tuple[float, int]:
        loss = trials[i].loss
        return (loss if math.isfinite(loss) else math.inf), -i

    best = sorted(range(len(trials)), key=rank)[:MOST_COMPARED]
    return [trials[i] for i in sorted(best)]


def cross_score(
    context: Context,
    trial: Trial,
    examples: Sequence[TokenisedExample],
    paths: Sequence[Path],
    folder: Path,
) -> list[Score]:
    """Scores of the examples, each under the coefficients that were found without its fold."""
    scores: dict[int, Score] = {}
    for positions, other in without_each_fold(trial, examples, paths, folder):
        found = score_trial(context, other, [examples[i] for i in positions])
        scores.update(zip(positions, found, strict=True))
        if other is not None and other.path != trial.path:
            release(context, other.path)
    return [scores[i] for i in range(len(examples))]


def without_each_fold(
    trial: Trial, examples: Sequence[TokenisedExample], paths: Sequence[Path], folder: Path
) -> Iterator[tuple[list[int], Trial | None]]:
    """Positions of examples, and what was found without them; None adds nothing to the base.

    What is combined for a fold is a file of `folder` until the next one is asked for.
    """
    for held_out in trial.held_out:
        path = held_out.path
        yield list(held_out.positions), replace(trial, path=path) if path else None
    if trial.held_out:
        return
    folds = assign_folds(examples)
    for fold, weights in zip(np.unique(folds), trial.folds, strict=True):
        positions = np.flatnonzero(folds == fold).tolist()
        if not weights.any():
            yield positions, None
            continue
        rescaled = _rescaled(trial, weights)
        other = rescaled or make_trial(f"fold {fold}", weights, paths, folder)
        yield positions, other
        if rescaled is None and other.path.parent == folder:
            other.path.unlink()


def _rescaled(trial: Trial, weights: NDArray[np.float64]) -> Trial | None:
    """The trial's own file at another scale, where that comes to these weights."""
    own, wanted = trial.weights, settled(weights)
    factor = float(own @ wanted) / float(own @ own) if own.any() else 0.0
    if not np.allclose(wanted, factor * own, atol=_SAME * float(np.abs(wanted).max())):
        return None
    candidate = replace(trial.candidate, scale=trial.candidate.scale * factor)
    return replace(trial, candidate=candidate)


def _settle(work: Work, parts: Parts, examples: Sequence[TokenisedExample], n_trials: int) -> None:
    """Give back what was set aside for more candidates or examples than there are.

    For one candidate more than was foreseen, tokens are taken that its search had spared.
    """
    n_reserved = count_compared(work)
    each = count_crossed_tokens(examples) if parts.is_crossed else count_tokens(examples)
    reserved = n_reserved * count_compared_tokens(parts) + count_tokens(
        parts.selection or parts.support
    )
    work.budget.give_back(reserved - n_trials * each - count_tokens(examples))


def _insist(work: Work, parts: Parts, n_examples: int, verdict: arbiter.Verdict) -> None:
    if work.options.force:
        work.warn("no candidate beat the base; the best one is written because of --force")
        return
    where = "in cross-validation" if parts.is_crossed else "of the selection part"
    raise NoImprovement(
        f"nothing beats the base on the {n_examples} examples {where}; no adapter was written",
        problems=verdict.reasons,
        hint="More examples, or adapters nearer to the task, may help; --force writes the "
        "best candidate all the same.",
    )
