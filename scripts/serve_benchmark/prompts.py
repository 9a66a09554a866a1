"""Prompts of an exact number of tokens, as text and as token ids, no two beginning alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.engine.tokens import Vocabulary

# Words that are one token each: SmolLM2's " something", and "▁1234" of scripts/make_shape.py.
_WORD = re.compile(r"[Ġ▁]([a-z]{3,9}|[0-9]{2,6})")
_TRIES = 50


@dataclass(frozen=True)
class Prompt:
    """The same prompt for a server that takes ids and for one that takes text only."""

    text: str
    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


class PromptMaker:
    """Draws prompts from the words of one vocabulary; the same seed gives the same prompts."""

    def __init__(self, vocabulary: Vocabulary, seed: int) -> None:
        self._vocabulary = vocabulary
        self._rng = np.random.default_rng(seed)
        found = map(_WORD.fullmatch, map(vocabulary.text_of, range(vocabulary.n_tokens)))
        self._words = [match[1] for match in found if match]

    def prompts(self, count: int, n_tokens: int, *, after: Prompt | None = None) -> list[Prompt]:
        """`count` prompts of exactly `n_tokens`; with `after`, each begins with that prompt."""
        return [self._one(n_tokens, after) for _ in range(count)]

    def _one(self, n_tokens: int, after: Prompt | None) -> Prompt:
        for _ in range(_TRIES):
            n_words = n_tokens - len(after.ids if after else self._start())
            words = [after.text] if after else []
            words += [str(word) for word in self._rng.choice(self._words, n_words)]
            # A word at the very beginning may take several tokens: then there are words too many.
            n_over = len(self.read(" ".join(words))) - n_tokens
            prompt = self.read(" ".join(words[: len(words) - max(0, n_over)]))
            kept = after is None or prompt.ids[: len(after)] == after.ids
            if len(prompt) == n_tokens and kept:
                return prompt
        raise SystemExit(f"no prompt of {n_tokens} tokens could be made of this vocabulary's words")

    def read(self, text: str) -> Prompt:
        """The ids of a text, BOS first where the vocabulary asks for it."""
        return Prompt(text, (*self._start(), *self._vocabulary.tokenize(text)))

    def _start(self) -> Sequence[int]:
        return (self._vocabulary.bos,) if self._vocabulary.adds_bos else ()
