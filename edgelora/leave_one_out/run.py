"""`bank evaluate`: base, mean, the default build and own adapters, each task's kin hidden."""

from __future__ import annotations

import glob
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.bank import Bank
from edgelora.build import Built, Listener, Options, build
from edgelora.build.pool import Pool, open_pool
from edgelora.build.search import release
from edgelora.build.trials import Budget, make_trial, try_scales
from edgelora.datasets.records import Dataset, Example
from edgelora.datasets.template import Template
from edgelora.engine.context import open_context
from edgelora.engine.model import Model, WeightedAdapter
from edgelora.engine.prepare import tokenise_examples
from edgelora.engine.score import TokenisedExample
from edgelora.errors import NoImprovement
from edgelora.leave_one_out.cases import draw, find_tasks
from edgelora.leave_one_out.judging import context_size, judge
from edgelora.leave_one_out.lines import Row, append_line, read_lines
from edgelora.leave_one_out.splits import Origin, hidden, origin_of

ARMS = ("base", "mean", "default", "own")
_KEY = ("task", "split", "labels", "n_test", "seed", "base", "arm")


@dataclass(frozen=True)
class Settings:
    """What a person may choose of an evaluation.

    Attributes:
        split: what of the bank a task does without; see splits.SPLITS.
        n_labels: training lines that a build is given.
        n_test: lines that judge.
        tasks: glob patterns of the adapters to take; () for all.
        with_answers: whether answers are generated, for exact match and ROUGE-L.
    """

    split: str = "source"
    n_labels: int = 16
    n_test: int = 50
    seed: int = 0
    tasks: tuple[str, ...] = ()
    with_answers: bool = True


@dataclass(frozen=True, eq=False)
class _Made:
    """An arm's adapters, what it says of itself, and the tokens that finding them took."""

    adapters: list[WeightedAdapter]
    chosen: str = ""
    n_tokens: int = 0


@dataclass(frozen=True, eq=False)
class _Task:
    """One task at work: a few of its lines, and the adapters that are not its kin."""

    name: str
    model: Model
    bank: Bank
    template: Template
    pool: Pool
    kin: Sequence[str]
    support: tuple[Example, ...]
    options: Options
    folder: Path

    def texts(self, examples: Sequence[Example]) -> list[TokenisedExample]:
        """Examples as token ids."""
        return tokenise_examples(self.model, self.template, examples)


def evaluate_bank(
    model: Model,
    bank: Bank,
    template: Template,
    data: Path,
    results: Path,
    settings: Settings | None = None,
    options: Options | None = None,
    *,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Measure every arm of every task that `results` lacks; a stopped run goes on there.

    Args:
        data: a folder with `<adapter>/train.*` and `<adapter>/test.*` for adapters of the bank.
        results: a file that a line of JSON is appended to for each task and arm.
        options: of the builds; what they exclude is joined by each task's kin.
        progress: called with ("arms", done, all).

    Returns:
        The lines of this evaluation, by task and arm.

    Raises:
        NotFound: no adapter has a dataset in `data`.
        DatasetError: too few lines.
        BankError: a task has nothing left to combine.
    """
    settings = settings or Settings()
    options = options or Options(seed=settings.seed)
    records = [r for r in bank.records() if r.base_id == model.base.identity.id]
    origins = {record.name: origin_of(record) for record in records}
    tasks = find_tasks(data, [name for name in origins if _is_wanted(name, settings.tasks)])
    if unknown := [task for task in tasks if not origins[task].sources]:
        warn(f"{len(unknown)} adapter(s) record no source, so that only they themselves are "
             f"hidden from their own task: {', '.join(unknown[:5])}")  # fmt: skip
    done = {_key(row): row for row in read_lines(results) if row.keys() >= set(_KEY)}
    found, n_done = [], 0
    for task in tasks:
        facts = _facts(task, origins[task], model, settings)
        missing = [arm for arm in ARMS if not _is_done(done, facts | {"arm": arm}, settings)]
        progress("arms", n_done, len(tasks) * len(ARMS))
        if missing:
            kin = hidden(task, origins, settings.split)
            with _open_task(task, kin, model, bank, template, data, settings, options) as work:
                for row in _measure(work, missing, data, settings, facts):
                    append_line(results, row)
                    done[_key(row)] = row
                    n_done += 1
                    progress("arms", n_done, len(tasks) * len(ARMS))
        n_done += len(ARMS) - len(missing)
        found += [done[_key(facts | {"arm": arm})] for arm in ARMS]
    progress("arms", n_done, len(tasks) * len(ARMS))
    return found


@contextmanager
def _open_task(
    name: str,
    kin: Sequence[str],
    model: Model,
    bank: Bank,
    template: Template,
    data: Path,
    settings: Settings,
    options: Options,
) -> Iterator[_Task]:
    pool = open_pool(bank, model.base.identity, [glob.escape(k) for k in kin])
    support = draw(data, name, "train", settings.n_labels, seed=settings.seed)
    with tempfile.TemporaryDirectory(prefix="edgelora-") as folder:
        yield _Task(name, model, bank, template, pool, kin, support, options, Path(folder))


def _measure(
    work: _Task, arms: Sequence[str], data: Path, settings: Settings, facts: Row
) -> Iterator[Row]:
    test = draw(data, work.name, "test", settings.n_test, seed=settings.seed)
    texts = work.texts(test)
    for arm in arms:
        started = time.perf_counter()
        made = _MAKERS[arm](work)
        elapsed_s = time.perf_counter() - started
        # Arms are judged in runs that go on from each other, whatever memory each of them had.
        with open_context(work.model, n_ctx=context_size(texts), kv_type="f16") as context:
            found = judge(context, made.adapters, texts, test, with_answers=settings.with_answers)
        yield facts | {
            "arm": arm,
            "loss": round(found.loss, 5),
            "exact": _rounded(found.exact_match),
            "rouge_l": _rounded(found.rouge_l),
            "chosen": made.chosen,
            "tokens": made.n_tokens,
            "elapsed_s": round(elapsed_s, 1),
        }


def _make_base(work: _Task) -> _Made:
    return _Made([])


def _make_own(work: _Task) -> _Made:
    return _Made([WeightedAdapter(work.bank.record(work.name).path)])


def _make_mean(work: _Task) -> _Made:
    """The uniform mean at the scale that is best on the support lines."""
    texts, k = work.texts(work.support), len(work.pool.records)
    budget = Budget(10**12)
    with open_context(work.model, n_ctx=context_size(texts)) as context:
        trial = make_trial("uniform mean", np.full(k, 1 / k), work.pool.paths, work.folder)
        trial = try_scales(context, trial, texts, budget)
        release(context, trial.path)
    return _Made(trial.weighted(), f"uniform mean x {trial.candidate.scale:g}", budget.n_used)


def _make_default(work: _Task) -> _Made:
    """What `edgelora build` writes; the base where it writes nothing."""
    dataset = Dataset(Path(work.name), "drawn", work.support, ())
    out, options = work.folder / "default.gguf", replace(work.options, force=False)
    built, n_tokens = build_without(
        work.kin, work.model, work.bank, dataset, work.template, out, options
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


_MAKERS: dict[str, Callable[[_Task], _Made]] = {
    "base": _make_base,
    "mean": _make_mean,
    "default": _make_default,
    "own": _make_own,
}


def _facts(task: str, origin: Origin, model: Model, settings: Settings) -> Row:
    return {
        "task": task,
        "source": sorted(origin.sources),
        "split": settings.split,
        "labels": settings.n_labels,
        "n_test": settings.n_test,
        "seed": settings.seed,
        "base": model.base.path.name,
    }


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _is_done(done: dict[tuple[Any, ...], Row], row: Row, settings: Settings) -> bool:
    """Whether there is such a line, with answers where they are wanted."""
    found = done.get(_key(row))
    return found is not None and not (settings.with_answers and found["exact"] is None)


def _is_wanted(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
