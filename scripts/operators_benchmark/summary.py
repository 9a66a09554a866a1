"""Lines of results as numbers of arms: means by task, shares, differences, nested choices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from result_lines import Row

from edgelora.leave_one_out.shares import MIN_GAP, Recovered, ahead, recovered
from edgelora.leave_one_out.splits import families
from edgelora.metrics import paired_bootstrap
from operators_benchmark.results import Key

Array = NDArray[np.float64]
ByTask = dict[str, list[Row]]
Interval = tuple[float, float, float]
NAN = math.nan


@dataclass(frozen=True, eq=False)
class Table:
    """All arms of one bed, split and number of labels.

    Attributes:
        arms: arm -> task -> its lines, one a seed, in the order of measuring.
        family: of each task; see splits.families.
    """

    bed: str
    split: str
    labels: int
    arms: Mapping[str, ByTask]
    family: Mapping[str, int]

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks with base and own."""
        return [task for task in self.arms["base"] if task in self.arms.get("own", {})]

    def of(self, arm: str) -> list[str]:
        """The tasks that an arm has."""
        return [task for task in self.tasks if task in self.arms.get(arm, {})]

    def means(self, arm: str, key: str, tasks: Sequence[str], like: str) -> Array:
        """The mean of one number of each task, over the seeds that the arm `like` has.

        NaN where a line lacks it.
        """
        found = []
        for task in tasks:
            seeds = {row["seed"] for row in self.arms[like][task]}
            rows = [row for row in self.arms[arm][task] if row["seed"] in seeds]
            values = [math.nan if row.get(key) is None else row[key] for row in rows]
            found.append(float(np.mean(values)))
        return np.array(found)

    def families_of(self, tasks: Iterable[str]) -> list[int]:
        """The family of each."""
        return [self.family[task] for task in tasks]

    def recovered(self, arm: str, tasks: Sequence[str] | None = None) -> Recovered:
        """The recovered share of an arm on the tasks that it has."""
        tasks = self.of(arm) if tasks is None else tasks
        columns = [self.means(name, "loss", tasks, arm) for name in ("base", arm, "own")]
        return recovered(*columns, self.families_of(tasks))

    def ratio(self, arm: str, tasks: Sequence[str] | None = None) -> float:
        """The ratio of `recovered` alone, without an interval; NaN without a gap."""
        tasks = self.of(arm) if tasks is None else tasks
        base, mine, own = (self.means(n, "loss", tasks, arm) for n in ("base", arm, "own"))
        kept = base - own > MIN_GAP
        return float((base - mine)[kept].sum() / (base - own)[kept].sum()) if any(kept) else NAN

    def ahead(self, first: str, second: str) -> Interval:
        """By how much the recovered share of one arm exceeds that of another."""
        tasks = [task for task in self.of(first) if task in self.arms[second]]
        names = (first, second, "base", "own")
        columns = [self.means(name, "loss", tasks, first) for name in names]
        return ahead(*columns, self.families_of(tasks))

    def difference(self, first: str, second: str, key: str) -> Interval | None:
        """The mean of first - second of one number over the tasks; None where they lack it."""
        tasks = [task for task in self.of(first) if task in self.arms[second]]
        gaps = self.means(first, key, tasks, first) - self.means(second, key, tasks, first)
        if not len(gaps) or np.isnan(gaps).any():
            return None
        return paired_bootstrap(gaps, np.ones(len(gaps)), self.families_of(tasks))

    def mean(self, arm: str, key: str) -> float:
        """The mean over an arm's tasks; NaN where lines lack it, or there are none."""
        tasks = self.of(arm)
        return float(self.means(arm, key, tasks, arm).mean()) if tasks else math.nan


def tables(rows: Mapping[Key, Row]) -> list[Table]:
    """One for each bed, split and number of labels that something was measured at."""
    kinds = {(r["bed"], r["split"], r["labels"]) for r in rows.values()}
    whole = sorted(kind for kind in kinds if kind[1] is not None and kind[2] is not None)
    return [_table(rows, *kind) for kind in whole]


def _table(rows: Mapping[Key, Row], bed: str, split: str, labels: int) -> Table:
    """Its tasks are those that an arm with a bank was measured on, with that much hidden."""
    arms: dict[str, ByTask] = {}
    of_bed = [row for row in rows.values() if row["bed"] == bed]
    sources = {row["task"]: row["source"] for row in of_bed}
    tasks = {row["task"] for row in of_bed if row["split"] == split}
    for row in of_bed:
        is_of = row["split"] in (None, split) and row["labels"] in (None, labels)
        if is_of and row["task"] in tasks:
            arms.setdefault(row["arm"], {}).setdefault(row["task"], []).append(row)
    arms = {"base": arms.pop("base", {}), **arms}
    return Table(bed, split, labels, arms, families(sources))


def best_of(table: Table, arms: Iterable[str]) -> str | None:
    """The arm of the largest recovered share, in hindsight, among those with the most tasks."""
    return max(_whole(table, arms), key=lambda arm: _or_least(table.ratio(arm)), default=None)


def _whole(table: Table, arms: Iterable[str]) -> list[str]:
    """Those with the most tasks."""
    counts = {arm: len(table.of(arm)) for arm in arms}
    most = max(counts.values(), default=0)
    return [arm for arm, n in counts.items() if n == most > 0]


def nested(table: Table, arms: Sequence[str]) -> tuple[dict[str, str], Recovered] | None:
    """An operator chosen inside the fold: for each family the arm that is best on all others.

    Args:
        arms: of which those with the most tasks are chosen from.

    Returns:
        The arm of each task, and what that recovers; None unless two families have all arms.
    """
    there = _whole(table, arms)
    tasks = [t for t in table.tasks if all(t in table.arms[arm] for arm in there)]
    if not there or len(set(table.families_of(tasks))) < 2:
        return None
    chosen = {task: _best_on_others(table, there, tasks, task) for task in tasks}
    losses = [
        np.array([table.means(name or chosen[t], "loss", [t], chosen[t])[0] for t in tasks])
        for name in ("base", "", "own")
    ]
    return chosen, recovered(*losses, table.families_of(tasks))


def _best_on_others(table: Table, arms: Sequence[str], tasks: Sequence[str], task: str) -> str:
    others = [t for t in tasks if table.family[t] != table.family[task]]
    return max(arms, key=lambda arm: _or_least(table.ratio(arm, others)))


def share_of(table: Table, arm: str, key: str) -> float:
    """(arm - base) / (own - base) of a score such as exact match, as a ratio of means."""
    tasks = table.of(arm)
    base, mine, own = (table.means(n, key, tasks, arm).mean() for n in ("base", arm, "own"))
    return float((mine - base) / (own - base)) if own > base else math.nan


def count_below(table: Table, arm: str, points: float = 0.02) -> int | None:
    """Cases whose ROUGE-L is more than `points` below the base's, its interval below 0."""
    found: list[Any] = [
        row["rouge_vs_base"]
        for task in table.of(arm)
        for row in table.arms[arm][task]
        if "rouge_vs_base" in row
    ]
    return sum(mid < -points and high < 0 for _, mid, high in found) if found else None


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
