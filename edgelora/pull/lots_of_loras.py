"""Lots-of-LoRAs: which of its adapters are wanted, and how their datasets are read."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgelora.bank.records import Facts
from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Dataset, Example, Message
from edgelora.errors import NotFound
from edgelora.pull.adapters import Wanted
from edgelora.suggest import suggest
from edgelora.suggest.catalogue import Entry, read_catalogue

__all__ = ["COLLECTION", "find_wanted", "nearest_wanted", "read_rows"]

COLLECTION = "lots-of-loras"
# The raw form of Super-NaturalInstructions, without chat markers, is what they were trained with.
TEMPLATE = "sni"

_EXAMPLES = re.compile(r"\s*\n\s*(?:Positive|Negative) Example \d+ ?-")
_ASKED = re.compile(r"\s*Input:(?P<instance>.*)\n\s*Output:\s*", re.DOTALL)
_LAST = "Now complete the following example -"


def find_wanted(patterns: Sequence[str] = ()) -> list[Wanted]:
    """The adapters whose task is named: whole, by its number (`task022`) or by a pattern with `*`.

    In the order of their names; without patterns, all of them.

    Raises:
        NotFound: patterns that no task fits; each is listed, with tasks of similar names.
    """
    catalogue = read_catalogue()
    every = sorted((*catalogue.counted, *catalogue.uncounted), key=lambda entry: entry.task)
    if not patterns:
        return [_wanted(entry) for entry in every]
    unknown = [p for p in patterns if not any(_fits(entry.task, p) for entry in every)]
    if unknown:
        names = [entry.task for entry in every]
        raise NotFound(
            f"{COLLECTION}: no such task: {', '.join(unknown)}",
            problems=[
                f"{p}: did you mean {' or '.join(close)}?"
                for p in unknown
                if (close := difflib.get_close_matches(p, names, n=3, cutoff=0.4))
            ],
            hint="A task is given whole, by its number (task022), or by a pattern ('*snli*').",
        )
    return [_wanted(entry) for entry in every if any(_fits(entry.task, p) for p in patterns)]


def nearest_wanted(
    examples: Sequence[Example], top: int, *, seed: int = 0
) -> tuple[list[Wanted], list[str]]:
    """The `top` adapters whose data is most like a person's examples, the nearest first.

    Returns:
        The adapters, and the tasks that could not be compared because nobody counted their data.
    """
    found = suggest(examples, top=top, seed=seed)
    nearest = [_wanted(one.entry) for one in found.nearest]
    return nearest, [entry.task for entry in found.left_out]


def read_rows(path: Path) -> Dataset:
    """A dataset of Lots-of-LoRAs: columns id, input and output (a list of right answers).

    `input` holds the whole prompt: definition, worked examples and the instance. The examples are
    the same in every row, so they are left out here: what remains, definition and instance parted
    by a blank line, is how every other task of this kind is read (datasets.formats), and what the
    template "sni" takes apart again.

    Raises:
        DatasetError: it cannot be read.
    """
    dataset = read_dataset(path, prompt_key="input", completion_key="output")
    examples = [_reduced(example) for example in dataset.examples]
    n_whole = sum(new is old for new, old in zip(examples, dataset.examples, strict=True))
    said = f"{n_whole} prompts of another form were taken whole"
    warnings = (*dataset.warnings, said) if n_whole else dataset.warnings
    return replace(dataset, examples=tuple(examples), warnings=warnings)


def _reduced(example: Example) -> Example:
    parts = split_prompt(example.prompt)
    if parts is None:
        return example
    return replace(example, messages=(Message("user", "\n\n".join(parts)),))


def split_prompt(prompt: str) -> tuple[str, str] | None:
    """Definition and instance of a raw prompt; None if it has another form.

    Example:
        >>> split_prompt("Definition: Add.\\n\\nNow complete the following example -\\n"
        ...              "Input: 1 2\\nOutput:")
        ('Add.', '1 2')
    """
    head, found, tail = prompt.rpartition(_LAST)
    asked = _ASKED.fullmatch(tail)
    if not found or asked is None or not head.startswith("Definition:"):
        return None
    definition = _EXAMPLES.split(head, maxsplit=1)[0].removeprefix("Definition:").strip()
    instance = asked["instance"].strip()
    return (definition, instance) if definition and instance else None


def _fits(task: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(task, pattern) or task.partition("_")[0] == pattern


def _wanted(entry: Entry) -> Wanted:
    facts = Facts(
        template=TEMPLATE,
        source=", ".join(entry.source) or None,
        licence=", ".join(entry.licence) or None,
        category=", ".join(entry.category) or None,
    )
    return Wanted(entry.task, entry.adapter, entry.dataset, facts)
