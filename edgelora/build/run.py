"""The build itself: split, measure, propose, try, take gradient steps, choose, write, judge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.bank import Bank
from edgelora.build.activated import make_activated, open_activations, try_activated, weigh
from edgelora.build.alone import Measured
from edgelora.build.automatic import settle_refinement
from edgelora.build.choosing import choose, contenders
from edgelora.build.clock import Clock
from edgelora.build.crossing import assign_folds
from edgelora.build.earlier import build_again, recall, remember
from edgelora.build.finish import (
    crossed_judgement,
    judge,
    keep_signature,
    make_built,
    publish_unjudged,
    write_trial,
)
from edgelora.build.forward import find_trials
from edgelora.build.gradients import Gradients, Opened, open_gradients
from edgelora.build.measuring import (
    embed_and_compare,
    measure_parts,
    plan_unmeasured,
)
from edgelora.build.pace import (
    cut_embedding_to_time,
    cut_to_time,
    fit_comparisons,
    seconds_left,
    tell_what_left,
)
from edgelora.build.polishing import train_factors
from edgelora.build.pool import find_warnings, open_pool
from edgelora.build.proposals import ACTIVATED, NONE, OPERATOR_NAMES, Nearness, propose
from edgelora.build.records import (
    AUTO,
    REFINEMENTS,
    Built,
    Listener,
    Options,
    Refined,
    Trained,
)
from edgelora.build.refining import OBJECTIVE_WORDS, refine
from edgelora.build.samples import held_out_of
from edgelora.build.search import Search
from edgelora.build.settling import settle
from edgelora.build.state import State, open_state
from edgelora.build.trials import (
    Budget,
    Trial,
    least_loss,
    make_trial,
    measure_trial,
)
from edgelora.build.work import (
    Parts,
    Work,
    count_compared_tokens,
    reserve_comparisons,
)
from edgelora.datasets.records import Dataset
from edgelora.datasets.template import Template
from edgelora.engine.model import Model
from edgelora.engine.prepare import tokenise_examples
from edgelora.engine.score import TokenisedExample, open_for
from edgelora.errors import AlreadyExists, DatasetError, EdgeLoRAError
from edgelora.files import publish, working_folder
from edgelora.gradient.descent import OBJECTIVES
from edgelora.gradient.variables import WEIGHTS
from edgelora.operators.distances import DISTANCES


def build(
    model: Model,
    bank: Bank,
    dataset: Dataset,
    template: Template,
    out: Path,
    options: Options | None = None,
    listener: Listener | None = None,
) -> Built:
    """Write one adapter for `dataset` to `out`, combined from the bank's adapters.

    The signature of the examples that it was proposed with is kept beside it, where there is one.

    Raises:
        AlreadyExists: `out` exists and `options.force` is false.
        BankError: no adapter of the bank is for this base.
        NoImprovement: nothing beat the base on the user's own examples; nothing is written.
        DatasetError: too few examples to measure anything.
        EdgeLoRAError: a budget too small for the comparisons, an operator that lacks its input, a
            full disk, or another process that makes the same file.
    """
    if not dataset.examples:
        raise DatasetError(f"{dataset.path}: no examples")
    work = open_work(model, bank, template, out, options or Options(), listener or Listener())
    build_it = _build_measured if dataset.has_completions else _build_unmeasured
    with folder_beside(out) as folder:
        return build_it(work, dataset, folder)


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` for the files of a build (see files.working_folder).

    Raises:
        EdgeLoRAError: a full disk, or another process that makes the same file.
    """
    try:
        with working_folder(out) as folder:
            yield folder
    except OSError as error:
        raise EdgeLoRAError(
            f"{out}: not written: {error.strerror or error} ({error.filename or 'while writing'})",
            hint="Make room, or choose a folder that can be written to, and run it again.",
        ) from error


def open_work(
    model: Model, bank: Bank, template: Template, out: Path, options: Options, listener: Listener
) -> Work:
    """A build about to begin, with what is worth a warning told; errors are those of `build`."""
    _refuse_unknown(options)
    if out.exists() and not options.force:
        raise AlreadyExists(f"{out} exists already", hint="Choose another name or add --force.")
    pool = open_pool(bank, model.base.identity, options.exclude, calibrated=options.calibrated)
    work = Work(model, template, options, Clock(listener), pool, out, Budget(options.budget_tokens))
    for message in find_warnings(pool, template.key):
        work.warn(message)
    return work


def _refuse_unknown(options: Options) -> None:
    for what, name, known in (
        ("operator", options.operator, OPERATOR_NAMES),
        ("distance", options.distance, tuple(DISTANCES)),
        ("refinement", options.refine, REFINEMENTS),
        ("kind of weights", options.weights, WEIGHTS),
        ("objective", options.objective or OBJECTIVES[0], OBJECTIVES),
    ):
        if name not in known:
            raise EdgeLoRAError(f"no {what} is named {name}", hint=f"One of {', '.join(known)}.")
    if options.operator == NONE and (options.refine == "gradient" or not options.polish):
        raise EdgeLoRAError(
            "the operator none combines nothing",
            hint="Add --polish N, which trains a LoRA from scratch, and no --refine gradient.",
        )
    if options.needs_gradients and options.combine == "linear":
        raise EdgeLoRAError(
            "linear averages factors, which is not the sum that gradients are computed for",
            hint="Use --combine svd or cat.",
        )
    if options.objective and options.refine not in (AUTO, "gradient"):
        raise EdgeLoRAError("an objective is for gradients", hint="Add --refine gradient.")


def _build_measured(work: Work, dataset: Dataset, folder: Path) -> Built:
    earlier = recall(work, dataset.examples)
    if earlier is not None:
        return build_again(work, earlier)
    settled = settle(work, dataset)
    parts, seconds = fit_comparisons(work, settled.parts), math.inf
    if work.options.needs_gradients and math.isfinite(work.options.limit_s):
        seconds = seconds_left(work, parts)
    elif work.options.operator not in ACTIVATED:
        parts = cut_to_time(work, parts)
    tell_what_left(work, settled.parts, parts)
    reserve_comparisons(work, parts)
    with ExitStack() as stack:
        activations = open_activations(work, work.options.operator, parts.support)
        steps = _open_steps(work, stack, parts.support, settled.opened, seconds, parts)
        nearness, measured, shown = measure_parts(
            work, settled.split, parts, settled.nearness, folder
        )
        trials = stack.enter_context(_trials(work.model))
        _search(work, parts, nearness, measured, shown, folder, trials)
        if activations is not None:
            trials.append(try_activated(work, activations, nearness, shown, folder))
        made = _take_steps(work, steps, nearness, parts, shown, folder, trials)
        with open_for(work.model, parts.all) as context:
            choice = choose(work, context, contenders(work, trials), parts, shown, folder)
        with publish(work.out, force=work.options.force) as temporary:
            merge = write_trial(work, choice.trial, nearness, temporary)
            with open_for(work.model, parts.all) as context:
                judgement = judge(work, context, temporary, parts, choice.base)
            keep_signature(work, nearness)
    if parts.is_crossed:
        judgement = crossed_judgement(choice.scores, choice.base, work.options.seed)
    losses = {t.candidate.name: t.loss for t in trials}
    built = replace(
        make_built(work, choice.trial, nearness, measured, losses, merge),
        verdict=choice.verdict, judgement=judgement, refined=made.refined, trained=made.trained,
    )  # fmt: skip
    remember(work, dataset.examples, built, choice.trial, nearness)
    return built


def _build_unmeasured(work: Work, dataset: Dataset, folder: Path) -> Built:
    """Without completions: by distances, activations, or gradients of another objective."""
    settle_refinement(work, None)
    operator = _refuse_without_completions(work)
    texts = tokenise_examples(work.model, work.template, dataset.examples)
    with ExitStack() as stack:
        activations = open_activations(work, operator, texts)
        seconds = work.options.limit_s
        steps = _open_steps(work, stack, texts, None, seconds)
        if activations is None and steps is None:
            cut_embedding_to_time(work, texts)
        with open_for(work.model, texts, hidden=True) as hidden:
            nearness = embed_and_compare(work, hidden, dataset.examples, 1.0)
        by = "distances" if activations is None else "activations"
        work.listener.plan(plan_unmeasured(work, len(dataset.examples), by))
        if activations is not None:
            weights = weigh(work, activations)
            trial = make_activated(work, activations, weights, nearness, folder)
        else:
            ((name, coefficients),) = propose(work.pool, nearness, None, operator)
            trial = _make(work, name, coefficients, folder)
        refined = None
        if steps is not None:
            trial, refined = refine(
                work, steps.gradients, trial.candidate, nearness, steps.state, folder
            )
        merge = publish_unjudged(work, nearness, partial(write_trial, work, trial, nearness))
    return replace(make_built(work, trial, nearness, None, {}, merge), refined=refined)


def _refuse_without_completions(work: Work) -> str:
    """The operator, and what is said of it."""
    options = work.options
    if options.polish:
        raise EdgeLoRAError(
            "the dataset has no completions, and --polish learns them",
            hint="Leave --polish out; --refine gradient has objectives that need none.",
        )
    if options.objective == "loss":
        raise EdgeLoRAError(
            "the dataset has no completions, and the objective loss needs them",
            hint=f"Choose --objective {' or '.join(OBJECTIVES[1:])}.",
        )
    if options.refine == "gradient":
        work.warn(
            "the dataset has no completions: the gradient is that of "
            f"{OBJECTIVE_WORDS[options.objective or 'prompts']}, and nothing measures "
            "whether answers get better"
        )
        return "uniform" if options.operator == "auto" else options.operator
    operator = options.operator
    if operator == "auto":
        operator = "normalized" if work.pool.signed else "logo"
    by = "activations" if operator in ACTIVATED else "distances"
    work.warn(f"the dataset has no completions: losses cannot be measured, {by} alone decide")
    return operator


@dataclass(frozen=True, eq=False)
class _Steps:
    """Gradients, and where the state of their steps is kept."""

    gradients: Gradients
    state: State


@dataclass(frozen=True)
class _Made:
    """What gradients did."""

    refined: Refined | None = None
    trained: Trained | None = None


def _open_steps(
    work: Work,
    stack: ExitStack,
    texts: Sequence[TokenisedExample],
    opened: Opened | None,
    seconds: float,
    parts: Parts | None = None,
) -> _Steps | None:
    """None where the options ask for no gradients; without completions there are no parts."""
    if not work.options.needs_gradients:
        return None
    state = stack.enter_context(open_state(work))
    gradients = open_gradients(
        work, texts, state.folder, parts is not None, opened=opened, seconds=seconds,
        is_crossed=parts is not None and parts.is_crossed,
        held_out=held_out_of(work, parts) if parts is not None else (),
    )  # fmt: skip
    return _Steps(gradients, state)


def _take_steps(
    work: Work,
    steps: _Steps | None,
    nearness: Nearness | None,
    parts: Parts,
    shown: Sequence[TokenisedExample],
    folder: Path,
    trials: list[Trial],
) -> _Made:
    """Append what gradients make of the trials, measured as they are."""
    if steps is None:
        return _Made()
    gradients, state, refined, trained = steps.gradients, steps.state, None, None
    if gradients.descent:
        start = trials[0] if work.options.operator == "auto" else least_loss(trials)
        trial, refined = refine(
            work, gradients, start.candidate, nearness, state, folder, is_crossed=parts.is_crossed
        )
        trials.append(_measured(work, trial, shown))
    if gradients.polish:
        best = least_loss(trials) if trials else None
        trial, trained = train_factors(
            work, gradients, best, nearness, state, folder, is_crossed=parts.is_crossed
        )
        trials.append(_measured(work, trial, shown))
    return _Made(refined, trained)


def _measured(work: Work, trial: Trial, shown: Sequence[TokenisedExample]) -> Trial:
    with open_for(work.model, shown) as context:
        return measure_trial(context, trial, shown, work.budget)


@contextmanager
def _trials(model: Model) -> Iterator[list[Trial]]:
    """A list for trials, whose adapters are unloaded at the end, whatever happens."""
    trials: list[Trial] = []
    try:
        yield trials
    finally:
        for trial in trials:
            model.unload(trial.path)


def _search(
    work: Work,
    parts: Parts,
    nearness: Nearness | None,
    measured: Measured,
    shown: Sequence[TokenisedExample],
    folder: Path,
    trials: list[Trial],
) -> None:
    """Fill `trials` by forward passes."""
    search = Search(
        work.model,
        work.pool,
        shown,
        nearness,
        measured if measured.positions else None,
        folder,
        work.budget,
        seed=work.options.seed,
        n_spared=count_compared_tokens(parts),
        progress=work.listener.progress,
        folds=assign_folds(shown) if parts.is_crossed else None,
    )
    find_trials(search, work.options.operator, trials)
    if work.budget.was_short:
        work.warn("the budget was spent before every scale and step could be tried")


def _make(work: Work, name: str, coefficients: NDArray[np.float64], folder: Path) -> Trial:
    pool = work.pool
    return make_trial(
        name, coefficients, pool.paths, folder,
        hashes=pool.hashes, progress=work.listener.progress,
    )  # fmt: skip
