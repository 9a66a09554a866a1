"""Parts of a dataset: what a build may fit on, what it may choose by, and what it must not see."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.datasets.records import Example, Message
from edgelora.errors import DatasetError

MIN_FOR_UNTOUCHED = 24


@dataclass(frozen=True)
class Split:
    """Three parts that share no prompt, each in the order of the file.

    `optimistic` is true where there were too few examples for an untouched part: then the best
    measurement there is was made on examples that the choice was made by.
    """

    support: tuple[Example, ...]
    selection: tuple[Example, ...]
    untouched: tuple[Example, ...]
    optimistic: bool


def split_examples(examples: Sequence[Example], *, seed: int = 0) -> Split:
    """Split into support (1/2), selection (1/4) and untouched (1/4), shuffled by `seed`.

    Below 24 examples, or below three different prompts, there is no untouched part: support 2/3,
    selection 1/3. Examples with one prompt (all its turns) stay in one part, so the sizes are as
    close to these shares as the groups allow; with distinct prompts they are exact (support gets
    what does not divide).

    Raises:
        DatasetError: fewer than two different prompts, so nothing could be measured.
    """
    groups = _grouped(examples)
    if len(groups) < 2:
        raise DatasetError(
            f"{len(groups)} different prompt(s) in {len(examples)} example(s): too few to measure",
            hint="Give at least two different prompts, better 24 or more.",
        )
    n = len(examples)
    optimistic = n < MIN_FOR_UNTOUCHED or len(groups) < 3
    shares = (max(n // 3, 1),) if optimistic else (n // 4, n // 4)
    random.Random(seed).shuffle(groups)
    parts = _dealt(groups, (n - sum(shares), *shares))
    ordered = [tuple(examples[i] for i in sorted(part)) for part in parts]
    return Split(ordered[0], ordered[1], () if optimistic else ordered[2], optimistic)


def _grouped(examples: Sequence[Example]) -> list[list[int]]:
    groups: dict[tuple[Message, ...], list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.messages, []).append(i)
    return list(groups.values())


def _dealt(groups: list[list[int]], sizes: tuple[int, ...]) -> list[list[int]]:
    """Give each group to the part that lacks the largest share of its size."""
    parts: list[list[int]] = [[] for _ in sizes]
    for group in groups:
        lacking = [1 - len(part) / size for part, size in zip(parts, sizes, strict=True)]
        parts[lacking.index(max(lacking))].extend(group)
    return parts
