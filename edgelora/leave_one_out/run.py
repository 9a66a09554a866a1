"""`bank evaluate`: base, mean, the default build and own adapters, each task's kin hidden."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from edgelora.adapters.base import Base
from edgelora.bank import Bank
from edgelora.errors import BankError, EdgeLoRAError
from edgelora.leave_one_out.arms import ARMS, Case
from edgelora.leave_one_out.cases import draw, find_tasks
from edgelora.leave_one_out.lines import Row, append_line, read_lines
from edgelora.leave_one_out.splits import Origin, hidden, origin_of

_KEY = ("task", "split", "labels", "n_test", "seed", "base", "arm")

# One arm of one task to its line.
Measure = Callable[[Case], Row]
# Calls it for many, here or elsewhere; names come back with their lines, in whatever order.
Each = Callable[[Measure, Iterable[tuple[str, Case]]], Iterator[tuple[str, "Row | EdgeLoRAError"]]]


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


def in_turn(
    measure: Measure, cases: Iterable[tuple[str, Case]]
) -> Iterator[tuple[str, Row | EdgeLoRAError]]:
    """Each in its turn, in this process; the first that is refused ends it."""
    for name, case in cases:
        yield name, measure(case)


def evaluate_bank(
    base: Base,
    bank: Bank,
    data: Path,
    results: Path,
    measure: Measure,
    settings: Settings | None = None,
    *,
    each: Each = in_turn,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Measure every arm of every task that `results` lacks; a stopped run goes on there.

    Args:
        data: a folder with `<adapter>/train.*` and `<adapter>/test.*` for adapters of the bank.
        results: a file that a line of JSON is appended to for each task and arm.
        measure: makes one line, here or on a worker; see `arms.measure`.
        each: calls it for all; `in_turn`, or that of a cluster.
        progress: called with ("arms", done, all).

    Returns:
        The lines of this evaluation, by task and arm.

    Raises:
        NotFound: no adapter has a dataset in `data`.
        DatasetError: too few lines.
        BankError: `each` went on past arms that could not be measured; each is named.
    """
    settings = settings or Settings()
    records = [r for r in bank.records() if r.base_id == base.identity.id]
    origins = {record.name: origin_of(record) for record in records}
    tasks = find_tasks(data, [name for name in origins if _is_wanted(name, settings.tasks)])
    if unknown := [task for task in tasks if not origins[task].sources]:
        warn(f"{len(unknown)} adapter(s) record no source, so that only they themselves are "
             f"hidden from their own task: {', '.join(unknown[:5])}")  # fmt: skip
    done = {_key(row): row for row in read_lines(results) if row.keys() >= set(_KEY)}
    wanted = [_facts(task, origins[task], base, settings) | {"arm": arm}
              for task in tasks for arm in ARMS]  # fmt: skip
    missing = [row for row in wanted if not _is_done(done, row, settings)]
    n_done, refused = len(wanted) - len(missing), []
    progress("arms", n_done, len(wanted))
    for name, found in each(measure, _cases(missing, origins, data, settings)):
        if isinstance(found, EdgeLoRAError):
            refused.append(f"{name}: {found}")
            continue
        append_line(results, found)
        done[_key(found)] = found
        n_done += 1
        progress("arms", n_done, len(wanted))
    if refused:
        raise BankError(
            f"{len(refused)} of {len(wanted)} arms could not be measured",
            problems=refused[:20],
            hint=f"The others are in {results}; the same command does what is missing.",
        )
    return [done[_key(row)] for row in wanted]


def _cases(
    rows: Sequence[Row], origins: Mapping[str, Origin], data: Path, settings: Settings
) -> Iterator[tuple[str, Case]]:
    """The missing lines as work, each with the lines of its task."""
    for task, of_task in itertools.groupby(rows, key=lambda row: str(row["task"])):
        kin = tuple(hidden(task, origins, settings.split))
        support = draw(data, task, "train", settings.n_labels, seed=settings.seed)
        test = draw(data, task, "test", settings.n_test, seed=settings.seed)
        for row in of_task:
            case = Case(task, row["arm"], row, kin, support, test, settings.with_answers)
            yield f"{task}, {case.arm}", case


def _facts(task: str, origin: Origin, base: Base, settings: Settings) -> Row:
    return {
        "task": task,
        "source": sorted(origin.sources),
        "split": settings.split,
        "labels": settings.n_labels,
        "n_test": settings.n_test,
        "seed": settings.seed,
        "base": base.path.name,
    }


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _is_done(done: dict[tuple[Any, ...], Row], row: Row, settings: Settings) -> bool:
    """Whether there is such a line, with answers where they are wanted."""
    found = done.get(_key(row))
    return found is not None and not (settings.with_answers and found["exact"] is None)


def _is_wanted(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
