"""A task as a person would bring it: a few of its lines, and others to be judged by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Example
from edgelora.errors import DatasetError, NotFound

PARTS = ("train", "test")


def find_tasks(data: Path, names: Sequence[str]) -> list[str]:
    """Those of `names` that have a folder with both parts in `data`, in their order.

    Raises:
        NotFound: none has.
    """
    found = [n for n in names if all(_files(data / n, part) for part in PARTS)]
    if not found:
        raise NotFound(
            f"{data}: no folder is named like an adapter of the bank and holds a train and a "
            "test file",
            problems=[f"no {data / name}" for name in names[:5]],
            hint="Lay the datasets out as FOLDER/ADAPTER/train.jsonl and FOLDER/ADAPTER/test.jsonl "
            "(or another format that `edgelora build --data` reads).",
        )
    return found


def draw(data: Path, task: str, part: str, n: int, *, seed: int) -> tuple[Example, ...]:
    """`n` lines of one part of a task's dataset, drawn by the seed; fewer are among more.

    Args:
        part: "train" or "test".

    Raises:
        NotFound: no such file, or several.
        DatasetError: it has fewer lines, or lines without a completion.
    """
    files = _files(data / task, part)
    if len(files) != 1:
        raise NotFound(f"{data / task}: {len(files)} files {part}.*, one is needed")
    examples = read_dataset(files[0]).examples
    if examples[0].completion is None or len(examples) < n:
        raise DatasetError(
            f"{files[0]}: {len(examples)} lines, {n} with completions are needed",
            hint="Ask for fewer lines, or leave that task out.",
        )
    order = random.Random(f"{seed} {task} {part}").sample(range(len(examples)), len(examples))
    return tuple(examples[i] for i in order[:n])


def _files(folder: Path, part: str) -> list[Path]:
    return sorted(folder.glob(f"{part}.*")) if folder.is_dir() else []
