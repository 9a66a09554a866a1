"""The build itself: split, measure, propose, try, choose, write, judge."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgelora.adapters.merge import MergeReport, merge_adapters
from edgelora.bank import Bank
from edgelora.build.pool import Pool, find_warnings, open_pool
from edgelora.build.proposals import (
    PENALTIES,
    Measured,
    Nearness,
    Proposal,
    find_nearness,
    losses_of,
    measure_alone,
    measure_base,
    propose,
    shortlist,
)
from edgelora.build.records import Built, Judgement, Listener, Options, Plan
from edgelora.build.trials import Budget, Trial, make_trial, score_trial, try_scales
from edgelora.datasets.records import Dataset
from edgelora.datasets.split import Split, split_examples
from edgelora.datasets.template import Template
from edgelora.engine.context import Context, open_context
from edgelora.engine.hidden import head_matrix
from edgelora.engine.model import Model, WeightedAdapter
from edgelora.engine.prepare import tokenise_examples
from edgelora.engine.score import TokenisedExample, count_tokens, mean_loss, paired_interval, score
from edgelora.errors import AlreadyExists, EdgeLoRAError, NoImprovement
from edgelora.files import publish
from edgelora.operators import arbiter

_SHARE_FOR_ADAPTERS = 0.65
_TRIES_A_CANDIDATE = 3
_N_CANDIDATES = 5 + len(PENALTIES)


@dataclass(frozen=True)
class _Parts:
    """The tokenised parts of a dataset; `judged` is what the finished file is compared on."""

    support: list[TokenisedExample]
    selection: list[TokenisedExample]
    judged: list[TokenisedExample]
    part: str


@dataclass
class _Work:
    """One build in progress."""

    model: Model
    template: Template
    options: Options
    listener: Listener
    pool: Pool
    out: Path
    budget: Budget
    warnings: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.listener.warn(message)


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

    Raises:
        AlreadyExists: `out` exists and `options.force` is false.
        BankError: no adapter of the bank is for this base.
        NoImprovement: nothing beat the base on the user's own examples; nothing is written.
        DatasetError: too few examples to measure anything.
        EdgeLoRAError: a budget too small for the comparisons, or an operator that lacks its input.
    """
    options, listener = options or Options(), listener or Listener()
    if out.exists() and not options.force:
        raise AlreadyExists(f"{out} exists already", hint="Choose another name or add --force.")
    pool = open_pool(bank, model.base.identity, options.exclude)
    work = _Work(
        model, template, options, listener, pool, out, Budget(options.budget_tokens)
    )
    for message in find_warnings(pool, template.key):
        work.warn(message)
    if dataset.examples[0].completion is None:
        return _build_unmeasured(work, dataset)
    return _build_measured(work, dataset)


def _build_measured(work: _Work, dataset: Dataset) -> Built:
    split = split_examples(dataset.examples, seed=work.options.seed)
    parts = _tokenise(work, split)
    _reserve(work, parts)
    nearness, measured, shown = _measure(work, split, parts)
    proposals = propose(work.pool, nearness, measured, work.options.operator)
    with tempfile.TemporaryDirectory(prefix="edgelora-") as folder:
        with open_context(work.model) as context:
            trials = _try(work, context, proposals, shown, Path(folder))
            verdict, trial = _choose(work, context, trials, parts.selection)
            support_losses = {t.candidate.name: t.loss for t in trials}
            with publish(work.out, force=work.options.force) as temporary:
                merge = _write(work, trial, nearness, temporary)
                judgement = _judge(work, context, temporary, parts)
    return _built(work, trial, nearness, measured, support_losses, verdict, judgement, merge)


def _build_unmeasured(work: _Work, dataset: Dataset) -> Built:
    """Without completions: the operator's combination by distance alone, at scale 1."""
    work.warn("the dataset has no completions: losses cannot be measured, distances alone decide")
    operator = "mixture" if work.options.operator == "auto" else work.options.operator
    with open_context(work.model, hidden=True) as context:
        nearness = find_nearness(
            context, work.pool, dataset.examples, work.options.distance, work.options.seed
        )
    ((name, coefficients),) = propose(work.pool, nearness, None, operator)
    with tempfile.TemporaryDirectory(prefix="edgelora-") as folder:
        trial = make_trial(name, coefficients, work.pool.paths, Path(folder))
        with publish(work.out, force=work.options.force) as temporary:
            merge = _write(work, trial, nearness, temporary)
            with open_context(work.model) as context:
                with _applied(context, temporary):
                    pass  # loading it is the check: a file that llama.cpp refuses is not published
    return _built(work, trial, nearness, None, {}, None, None, merge)


def _tokenise(work: _Work, split: Split) -> _Parts:
    support, selection, untouched = (
        tokenise_examples(work.model, work.template, part)
        for part in (split.support, split.selection, split.untouched)
    )
    for message in work.template.warnings:
        work.warn(message)
    if split.optimistic:
        return _Parts(support, selection, selection, "selection part, optimistic")
    return _Parts(support, selection, untouched, "untouched")


def _reserve(work: _Work, parts: _Parts) -> None:
    """Set the tokens of the comparisons aside, so that no search can eat them."""
    n_tokens = 2 * count_tokens(parts.judged)
    n_tokens += (1 + _N_CANDIDATES) * count_tokens(parts.selection)
    if not work.budget.take(n_tokens):
        raise EdgeLoRAError(
            f"a budget of {work.budget.n_tokens:,} tokens is less than the {n_tokens:,} that "
            "comparing the candidates with the base takes",
            hint="Give a larger --budget, or fewer or shorter examples.",
        )


def _measure(
    work: _Work, split: Split, parts: _Parts
) -> tuple[Nearness | None, Measured, list[TokenisedExample]]:
    """Distances by embeddings, then the loss of each adapter alone on support examples."""
    options, pool = work.options, work.pool
    with open_context(work.model, hidden=True) as context:
        work.listener.progress("embedding your examples", 0, 1)
        nearness = find_nearness(context, pool, split.support, options.distance, options.seed)
        work.listener.progress("embedding your examples", 1, 1)
        work.budget.take(min(context.n_decoded, work.budget.left))
        positions, shown = shortlist(
            pool, parts.support, nearness, int(_SHARE_FOR_ADAPTERS * work.budget.left)
        )
        base, tokens_per_s = measure_base(context, shown)
        work.budget.take((1 + len(positions)) * count_tokens(shown))
        work.listener.plan(_plan(work, split, len(positions), shown, tokens_per_s))
        alone = measure_alone(
            context,
            [pool.paths[i] for i in positions],
            shown,
            lambda done, total: work.listener.progress("measuring adapters", done, total),
        )
    head = head_matrix(work.model)
    return nearness, Measured(positions, losses_of(alone, head), base, alone, head), shown


def _plan(
    work: _Work, split: Split, n_measured: int, shown: Sequence[TokenisedExample], speed: float
) -> Plan:
    tries = _N_CANDIDATES * _TRIES_A_CANDIDATE * count_tokens(shown)
    return Plan(
        n_support=len(split.support),
        n_selection=len(split.selection),
        n_untouched=len(split.untouched),
        n_adapters=len(work.pool.records),
        n_measured=n_measured,
        n_shown=len(shown),
        n_tokens=work.budget.n_used + min(tries, work.budget.left),
        budget_tokens=work.budget.n_tokens,
        tokens_per_s=speed,
    )


def _try(
    work: _Work,
    context: Context,
    proposals: Sequence[Proposal],
    shown: Sequence[TokenisedExample],
    folder: Path,
) -> list[Trial]:
    """Each candidate as a file, at the scale that is best on the support examples."""
    trials = []
    for done, (name, coefficients) in enumerate(proposals):
        work.listener.progress("trying candidates", done, len(proposals))
        trial = make_trial(name, coefficients, work.pool.paths, folder)
        trials.append(try_scales(context, trial, shown, work.budget))
    work.listener.progress("trying candidates", len(proposals), len(proposals))
    if any(np.isnan(trial.loss) for trial in trials):
        work.warn("the budget was spent before every candidate's scale could be tried")
    return trials


def _choose(
    work: _Work,
    context: Context,
    trials: Sequence[Trial],
    selection: Sequence[TokenisedExample],
) -> tuple[arbiter.Verdict, Trial]:
    """The arbiter's choice on the selection part; the best candidate if --force overrules it.

    Raises:
        NoImprovement: the base is best and force is off.
    """
    base = score_trial(context, None, selection)
    scores = [score_trial(context, trial, selection) for trial in trials]
    verdict = arbiter.choose(
        [trial.candidate for trial in trials],
        [[s.nll for s in row] for row in scores],
        [s.n_tokens for s in base],
        [s.nll for s in base],
    )
    if verdict.position is not None:
        return verdict, trials[verdict.position]
    best = min(range(len(trials)), key=lambda i: mean_loss(scores[i]))
    if not work.options.force:
        raise NoImprovement(
            f"nothing beats the base on the {len(selection)} examples of the selection part; "
            "no adapter was written",
            problems=verdict.reasons,
            hint="More examples, or adapters nearer to the task, may help; --force writes the "
            "best candidate all the same.",
        )
    work.warn("no candidate beat the base; the best one is written because of --force")
    return verdict, trials[best]


def _write(work: _Work, trial: Trial, nearness: Nearness | None, path: Path) -> MergeReport:
    options, pool = work.options, work.pool
    used = np.flatnonzero(trial.candidate.coefficients)
    coefficients = trial.candidate.coefficients[used] * trial.candidate.scale
    provenance: dict[str, object] = {
        "operator": trial.candidate.name,
        "distance": options.distance if nearness else "",
        "distances": {
            pool.names[i]: round(float(nearness.distances[i]), 6)
            for i in used
            if nearness and np.isfinite(nearness.distances[i])
        },
        "seed": options.seed,
        "budget_tokens": options.budget_tokens,
    }
    return merge_adapters(
        [pool.paths[i] for i in used],
        [float(c) for c in coefficients],
        path,
        method=options.combine,
        rank=options.rank,
        dtype=options.dtype,
        metadata={"edgelora.template": work.template.key, "edgelora.name": work.out.stem},
        provenance=provenance,
    )


def _judge(work: _Work, context: Context, finished: Path, parts: _Parts) -> Judgement:
    """The finished file, loaded, against the base.

    Raises:
        NoImprovement: the base is better there and force is off.
    """
    context.apply([])
    base = score(context, parts.judged)
    with _applied(context, finished):
        adapter = score(context, parts.judged)
    judgement = Judgement(
        parts.part,
        len(parts.judged),
        mean_loss(base),
        mean_loss(adapter),
        paired_interval(adapter, base, work.options.seed),
    )
    if judgement.adapter_loss < judgement.base_loss:
        return judgement
    message = (
        f"the finished adapter is no better than the base on the {judgement.n_examples} examples "
        f"({parts.part}): {judgement.adapter_loss:.4f} against {judgement.base_loss:.4f} nats"
    )
    if not work.options.force:
        raise NoImprovement(message, hint="It was deleted. --force keeps it all the same.")
    work.warn(message)
    return judgement


@contextmanager
def _applied(context: Context, path: Path) -> Iterator[None]:
    """Apply one file for the block, then let go of it, so that it can be renamed or deleted."""
    context.apply([WeightedAdapter(path)])
    try:
        yield
    finally:
        context.apply([])
        context.model.unload(path)


def _built(
    work: _Work,
    trial: Trial,
    nearness: Nearness | None,
    measured: Measured | None,
    support_losses: dict[str, float],
    verdict: arbiter.Verdict | None,
    judgement: Judgement | None,
    merge: MergeReport,
) -> Built:
    names, candidate = work.pool.names, trial.candidate
    for message in merge.warnings:
        work.warn(message)
    distances = nearness.distances if nearness else np.full(len(names), np.inf)
    alone = zip(measured.positions, measured.losses, strict=True) if measured else ()
    return Built(
        out=work.out,
        chosen=candidate.name,
        coefficients={
            names[i]: float(candidate.coefficients[i] * candidate.scale)
            for i in np.flatnonzero(candidate.coefficients)
        },
        distances={n: float(d) for n, d in zip(names, distances, strict=True) if np.isfinite(d)},
        losses_alone={names[i]: float(loss) for i, loss in alone},
        support_losses=support_losses,
        verdict=verdict,
        judgement=judgement,
        merge=merge,
        n_tokens=work.budget.n_used,
        elapsed_s=time.monotonic() - work.started,
        warnings=tuple(work.warnings),
    )
