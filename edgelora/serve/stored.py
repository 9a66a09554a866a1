"""KV cells of finished requests in plain memory, where they slow no decode down. No llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.serve.prefixes import Tokens, common_prefix

_MAX_ENTRIES = 512  # each is compared with each new prompt


@dataclass(frozen=True, eq=False)
class Entry:
    """What one sequence was: its tokens, and its cells as llama.cpp wrote them."""

    key: Hashable
    tokens: Tokens
    data: NDArray[np.uint8]


class Stored:
    """At most `max_bytes` of entries; those that were not used for longest go first."""

    def __init__(self, max_bytes: int) -> None:
        self.n_bytes = 0
        self._max_bytes = max_bytes
        self._entries: list[Entry] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_off(self) -> bool:
        """Whether nothing is kept at all."""
        return self._max_bytes <= 0

    def add(self, entry: Entry) -> None:
        """Keep an entry in place of those that it begins with, unless it is too large."""
        if entry.data.nbytes > self._max_bytes:
            return
        for other in [other for other in self._entries if other.key == entry.key]:
            n = common_prefix(other.tokens, entry.tokens)
            if n == len(entry.tokens):
                return
            if n == len(other.tokens):
                self.remove(other)
        self._entries.append(entry)
        self.n_bytes += entry.data.nbytes
        while self.n_bytes > self._max_bytes or len(self._entries) > _MAX_ENTRIES:
            self.remove(self._entries[0])

    def remove(self, entry: Entry) -> None:
        """Forget an entry."""
        self._entries.remove(entry)
        self.n_bytes -= entry.data.nbytes

    def longest(self, key: Hashable, prompt: Tokens) -> tuple[Entry | None, int]:
        """The entry of `key` that shares most with `prompt`, and how many tokens."""
        best: tuple[Entry | None, int] = (None, 0)
        for entry in self._entries:
            if entry.key == key and (n := common_prefix(entry.tokens, prompt)) > best[1]:
                best = entry, n
        return best

    def use(self, entry: Entry, n_common: int) -> None:
        """Its cells are in the KV cache again: it stays only if it holds more than those."""
        if entry not in self._entries:  # room was made meanwhile
            return
        self.remove(entry)
        if n_common < len(entry.tokens):
            self._entries.append(entry)
            self.n_bytes += entry.data.nbytes

    def drop_keys(self, is_unwanted: Callable[[Hashable], bool]) -> None:
        """Forget the entries of some keys."""
        for entry in [entry for entry in self._entries if is_unwanted(entry.key)]:
            self.remove(entry)
