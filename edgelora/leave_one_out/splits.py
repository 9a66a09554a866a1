"""Which adapters must not help a task: its own, those of its source, those of its category."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgelora.bank import BankRecord

SPLITS = ("task", "source", "category")


@dataclass(frozen=True)
class Origin:
    """Where the data of an adapter comes from; empty where nothing is recorded."""

    sources: frozenset[str]
    categories: frozenset[str] = frozenset()


def origin_of(record: BankRecord) -> Origin:
    """What `edgelora bank add` recorded."""
    return Origin(record.sources, record.categories)


def hidden(task: str, origins: Mapping[str, Origin], split: str) -> list[str]:
    """The adapters that `task` must do without, its own among them, in the order of `origins`.

    Leave one task out hides its own adapter; leave one source out those that share a source with
    it too; leave one category out those that share a category besides.

    Raises:
        KeyError: an unknown task.
        ValueError: an unknown split.

    Example:
        >>> a, b = Origin(frozenset("x")), Origin(frozenset("xy"))
        >>> hidden("1", {"1": a, "2": b, "3": Origin(frozenset("y"))}, "source")
        ['1', '2']
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: one of {', '.join(SPLITS)}")
    own, akin = origins[task], []
    for name, origin in origins.items():
        shares_source = split != "task" and bool(origin.sources & own.sources)
        shares_category = split == "category" and bool(origin.categories & own.categories)
        if name == task or shares_source or shares_category:
            akin.append(name)
    return akin


def families(sources: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """A number for each task: tasks that share a source, directly or through others, have one.

    Families are what a bootstrap may draw and what folds may part: no source lies in two.

    Args:
        sources: of each task; a task without any is a family of its own.
    """
    parents = {task: task for task in sources}
    first: dict[str, str] = {}  # source -> the first task that has it

    def root(task: str) -> str:
        while parents[task] != task:
            task = parents[task]
        return task

    for task, names in sources.items():
        for name in names:
            parents[root(task)] = root(first.setdefault(name, task))
    numbers: dict[str, int] = {}
    return {task: numbers.setdefault(root(task), len(numbers)) for task in sources}


def deal(families: Mapping[str, int], n_folds: int, *, seed: int = 0) -> dict[str, int]:
    """The fold of each task: whole families, shuffled, each to the fold with the fewest tasks."""
    members: dict[int, list[str]] = {}
    for task, family in families.items():
        members.setdefault(family, []).append(task)
    order: Sequence[int] = random.Random(seed).sample(sorted(members), len(members))
    sizes, folds = [0] * n_folds, dict[str, int]()
    for family in order:
        fold = sizes.index(min(sizes))
        sizes[fold] += len(members[family])
        folds |= dict.fromkeys(members[family], fold)
    return folds
