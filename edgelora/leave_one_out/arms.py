"""The arms of an evaluation, made and judged: base, mean, the default build, the own adapter."""

from __future__ import annotations

import glob
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgelora.bank import Bank
from edgelora.build import Built, Listener, Options, build
from edgelora.build.pool import open_pool
from edgelora.build.search import release
from edgelora.build.trials import Budget, make_trial, try_scales
from edgelora.datasets.records import Dataset, Example
from edgelora.datasets.template import Template
from edgelora.engine.context import open_context
from edgelora.engine.model import Model, WeightedAdapter
from edgelora.engine.prepare import tokenise_examples
from edgelora.engine.score import TokenisedExample
from edgelora.errors import NoImprovement
from edgelora.leave_one_out.judging import context_size, judge
from edgelora.leave_one_out.lines import Row


@dataclass(frozen=True, eq=False)
class Case:
    """One arm of one task: all that measuring it takes beside a base and a bank. It travels.

    Attributes:
        facts: what its line begins with, the arm among it.
        kin: the adapters that must not help.
        support: lines to build on; test: lines to judge by.
        with_answers: whether answers are generated, for exact match and ROUGE-L.
    """

    task: str
    arm: str
    facts: Row
    kin: tuple[str, ...]
    support: tuple[Example, ...]
    test: tuple[Example, ...]
    with_answers: bool


@dataclass(frozen=True, eq=False)
class _Work:
    """A case at work, with what it takes and a folder of its own."""

    case: Case
    model: Model
    bank: Bank
    template: Template
    options: Options
    folder: Path

    def texts(self, examples: Sequence[Example]) -> list[TokenisedExample]:
        """Examples as token ids."""
        return tokenise_examples(self.model, self.template, examples)


@dataclass(frozen=True, eq=False)
class _Made:
    """An arm's adapters, what it says of itself, and the tokens that finding them took."""

    adapters: list[WeightedAdapter]
    chosen: str = ""
    n_tokens: int = 0


def measure(model: Model, bank: Bank, template: Template, options: Options, case: Case) -> Row:
    """The line of one arm of one task.

    Args:
        options: of the build; what they exclude is joined by the task's kin.

    Raises:
        BankError: the task has nothing left to combine.
        EngineError: a test line is longer than the base can read.
    """
    with tempfile.TemporaryDirectory(prefix="edgelora-") as folder:
        work = _Work(case, model, bank, template, options, Path(folder))
        texts = work.texts(case.test)
        started = time.perf_counter()
        made = _MAKERS[case.arm](work)
        elapsed_s = time.perf_counter() - started
        # Arms are judged in runs that go on from each other, whatever memory each of them had.
        with open_context(model, n_ctx=context_size(texts), kv_type="f16") as context:
            found = judge(context, made.adapters, texts, case.test, with_answers=case.with_answers)
    return case.facts | {
        "loss": round(found.loss, 5),
        "exact": _rounded(found.exact_match),
        "rouge_l": _rounded(found.rouge_l),
        "chosen": made.chosen,
        "tokens": made.n_tokens,
        "elapsed_s": round(elapsed_s, 1),
    }


def _make_base(work: _Work) -> _Made:
    return _Made([])


def _make_own(work: _Work) -> _Made:
    return _Made([WeightedAdapter(work.bank.record(work.case.task).path)])


def _make_mean(work: _Work) -> _Made:
    """The uniform mean at the scale that is best on the support lines."""
    pool = open_pool(work.bank, work.model.base.identity, [glob.escape(k) for k in work.case.kin])
    texts, k = work.texts(work.case.support), len(pool.records)
    budget = Budget(10**12)
    with open_context(work.model, n_ctx=context_size(texts)) as context:
        trial = make_trial("uniform mean", np.full(k, 1 / k), pool.paths, work.folder)
        trial = try_scales(context, trial, texts, budget)
        release(context, trial.path)
    return _Made(trial.weighted(), f"uniform mean x {trial.candidate.scale:g}", budget.n_used)


def _make_default(work: _Work) -> _Made:
    """What `edgelora build` writes; the base where it writes nothing."""
    dataset = Dataset(Path(work.case.task), "drawn", work.case.support, ())
    out, options = work.folder / "default.gguf", replace(work.options, force=False)
    built, n_tokens = build_without(
        work.case.kin, work.model, work.bank, dataset, work.template, out, options
    )
    if built is None:
        return _Made([], "base", n_tokens)
    return _Made([WeightedAdapter(out)], built.chosen, n_tokens)


def build_without(
    kin: Sequence[str],
    model: Model,
    bank: Bank,
    dataset: Dataset,
    template: Template,
    out: Path,
    options: Options,
) -> tuple[Built | None, int]:
    """What `edgelora build` makes without the adapters `kin`, and its tokens.

    Where nothing beats the base there is no adapter, and the tokens are those that it planned.
    """
    planned = [0]
    listener = Listener(plan=lambda plan: planned.append(plan.n_tokens))
    options = replace(options, exclude=(*options.exclude, *map(glob.escape, kin)))
    try:
        built = build(model, bank, dataset, template, out, options, listener)
    except NoImprovement:
        return None, planned[-1]
    return built, built.n_tokens


_MAKERS: dict[str, Callable[[_Work], _Made]] = {
    "base": _make_base,
    "mean": _make_mean,
    "default": _make_default,
    "own": _make_own,
}
ARMS = tuple(_MAKERS)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
