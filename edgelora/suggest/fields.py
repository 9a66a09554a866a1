"""A dataset as three texts, as the catalogue counts them: instruction, prompts and completions."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.datasets.records import Example
from edgelora.suggest.catalogue import N_VOCAB

# Fewer words in common are a label such as "Ticket:", not an instruction.
_MIN_WORDS = 3
_UNIT_END = re.compile(r"\n|[.?!:](?=\s)")


@dataclass(frozen=True)
class FieldTexts:
    """The texts of a dataset, apart.

    Attributes:
        instructions: what prompts have in common, each text once; () where they have nothing.
        prompts: what is left of each prompt.
        completions: the first answer of each example, () without answers.
    """

    instructions: tuple[str, ...]
    prompts: tuple[str, ...]
    completions: tuple[str, ...]

    def by_field(self) -> dict[str, tuple[str, ...]]:
        """The texts by the catalogue's names of fields."""
        return {
            "instruction": self.instructions,
            "prompt": self.prompts,
            "completion": self.completions,
        }


def split_fields(examples: Sequence[Example]) -> FieldTexts:
    """Take the instruction, which the catalogue counts once, out of the prompts.

    It is what all prompts begin with, up to the end of a paragraph, or else of a line or sentence.
    Where they do not begin alike, or there is one prompt only, it is the first paragraph of each
    prompt that has another one below it, if it begins several prompts (or the one).

    Example:
        >>> from edgelora.datasets.records import Message
        >>> texts = [f"Is this a fruit? {name}" for name in ("Apple", "Oak")]
        >>> split_fields([Example((Message("user", t),), None, (), 1) for t in texts])
        FieldTexts(instructions=('Is this a fruit?',), prompts=('Apple', 'Oak'), completions=())
    """
    prompts = ["\n".join(message.content for message in e.messages) for e in examples]
    shared = _shared_start(prompts)
    if shared:
        instructions = [shared.strip()]
        rest = [prompt[len(shared) :] for prompt in prompts]
    else:
        instructions, rest = _first_paragraphs(prompts)
    completions = tuple(e.completion for e in examples if e.completion is not None)
    return FieldTexts(tuple(instructions), tuple(text.strip() for text in rest), completions)


def count_tokens(
    texts: Iterable[str], tokenize: Callable[[str], Sequence[int]]
) -> NDArray[np.float64]:
    """How often each token of the catalogue's vocabulary occurs in the texts, (N_VOCAB,)."""
    ids = [token for text in texts for token in tokenize(text)]
    return np.bincount(np.array(ids, np.int64), minlength=N_VOCAB).astype(np.float64)


def count_fields(
    fields: FieldTexts, tokenize: Callable[[str], Sequence[int]]
) -> Mapping[str, NDArray[np.float64]]:
    """The token counts of each field, (N_VOCAB,); zeros where the dataset has no such text."""
    return {name: count_tokens(texts, tokenize) for name, texts in fields.by_field().items()}


def _shared_start(prompts: Sequence[str]) -> str:
    """What all prompts begin with, cut after a paragraph, line or sentence; '' if too little."""
    if len(set(prompts)) < 2:
        return ""
    common = os.path.commonprefix(list(prompts))
    # Below a blank line comes the text of one example; what it begins with is a label.
    paragraphs = common.rpartition("\n\n")[0]
    ends = [match.end() for match in _UNIT_END.finditer(common)]
    whole = paragraphs or (common[: ends[-1]] if ends else "")
    return whole if len(whole.split()) >= _MIN_WORDS else ""


def _first_paragraphs(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    parts = [prompt.partition("\n\n") for prompt in prompts]
    n_prompts = Counter(head for head, _, rest in parts if rest.strip())
    needed = min(2, len(set(prompts)))
    instructions = [
        head for head, n in n_prompts.items() if n >= needed and len(head.split()) >= _MIN_WORDS
    ]
    rest = [
        rest if head in instructions and rest.strip() else prompt
        for prompt, (head, _, rest) in zip(prompts, parts, strict=True)
    ]
    return instructions, rest
