"""Which tokens the KV cache holds, sequence by sequence, and who may share them. No llama.cpp."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Start:
    """How a sequence begins; the caller does the same to the KV cache, in this order.

    Attributes:
        dropped: sequences to remove.
        sequence: the new one's id.
        source: share the first `n_kept` cells of this one; None: there is nothing to share.
        truncate: `sequence` held more tokens than `n_kept` before (it is taken over).
        n_kept: prompt tokens that need not be computed.
    """

    sequence: int
    n_kept: int = 0
    source: int | None = None
    truncate: bool = False
    dropped: tuple[int, ...] = ()


@dataclass
class _Sequence:
    key: Hashable
    n_tokens: int
    is_running: bool
    last_used: int


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens two texts share at their beginning."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


class Prefixes:
    """The book-keeping of one unified KV cache.

    Sequences of running requests are never dropped; those of finished ones are kept, at most
    `n_cached`, and go least recently used first. A cell that several sequences share is counted
    once: `n_used` is what llama.cpp counts too.

    Args:
        n_sequences: ids that there are; more than run at the same time.
        n_ctx: tokens of one sequence at most.
        n_cells: of the cache.
        n_cached: finished sequences that are kept.
        on_evict: called with the id, key and tokens of a finished sequence before it is dropped to
            make room.
    """

    def __init__(
        self,
        n_sequences: int,
        n_ctx: int,
        n_cells: int,
        n_cached: int,
        on_evict: Callable[[int, Hashable, Tokens], None] = lambda number, key, tokens: None,
    ) -> None:
        self.n_cells = n_cells
        self._on_evict = on_evict
        self._n_cached = n_cached
        self._sequences: dict[int, _Sequence] = {}
        self._unused = list(range(n_sequences))
        self._tokens = np.zeros((n_sequences, n_ctx), np.int32)
        # Cells by number, as if llama.cpp told us its own; only how many are in use matters.
        self._cells = np.zeros((n_sequences, n_ctx), np.int32)
        self._n_owners = np.zeros(n_cells, np.int32)
        self._free = np.arange(n_cells, dtype=np.int32)
        self._n_free = n_cells
        self._clock = itertools.count()

    @property
    def n_used(self) -> int:
        """Cells that hold tokens."""
        return self.n_cells - self._n_free

    @property
    def n_finished(self) -> int:
        """Sequences of finished requests."""
        return sum(not sequence.is_running for sequence in self._sequences.values())

    def longest(self, key: Hashable, prompt: Tokens) -> tuple[int | None, int]:
        """The sequence of `key` that shares most with `prompt`, and how many tokens."""
        best: tuple[int | None, int] = (None, 0)
        for number, sequence in self._sequences.items():
            if sequence.key == key:
                n = common_prefix(self._tokens[number, : sequence.n_tokens], prompt)
                if n > best[1] or (n and n == best[1] and not sequence.is_running):
                    best = number, n
        return best

    def start(self, key: Hashable, prompt: Tokens, *, reuse: bool = True) -> Start:
        """A sequence for `prompt`, which takes over or shares the longest prefix there is.

        At least one token of the prompt is left to compute: its logits are wanted.
        """
        source, n_common = self.longest(key, prompt) if reuse else (None, 0)
        n_kept = min(n_common, len(prompt) - 1)
        if source is None or n_kept == 0:
            number, dropped = self._new_number(None)
            return self._begin(Start(number, dropped=dropped), key)
        held = self._sequences[source]
        if not held.is_running and (held.n_tokens == n_common or not self._can_grow(source)):
            truncate = held.n_tokens > n_kept
            self._release(source, n_kept)
            return self._begin(Start(source, n_kept, truncate=truncate), key)
        number, dropped = self._new_number(source)
        self._tokens[number, :n_kept] = self._tokens[source, :n_kept]
        self._cells[number, :n_kept] = self._cells[source, :n_kept]
        self._n_owners[self._cells[source, :n_kept]] += 1
        held.last_used = next(self._clock)
        return self._begin(Start(number, n_kept, source, dropped=dropped), key)

    def extend(self, number: int, tokens: Tokens | list[int]) -> None:
        """These tokens of a sequence have been computed."""
        sequence = self._sequences[number]
        start, end = sequence.n_tokens, sequence.n_tokens + len(tokens)
        if len(tokens) > self._n_free:
            raise ValueError(f"{len(tokens)} tokens, but {self._n_free} free cells")
        cells = self._free[self._n_free - len(tokens) : self._n_free]
        self._n_free -= len(tokens)
        self._tokens[number, start:end] = tokens
        self._cells[number, start:end] = cells
        self._n_owners[cells] = 1
        sequence.n_tokens = end

    def append(self, number: int, token: int) -> None:
        """As `extend` for one token, which happens for every one that is generated."""
        sequence = self._sequences[number]
        if self._n_free < 1:
            raise ValueError("no free cells")
        self._n_free -= 1
        cell = self._free[self._n_free]
        self._tokens[number, sequence.n_tokens] = token
        self._cells[number, sequence.n_tokens] = cell
        self._n_owners[cell] = 1
        sequence.n_tokens += 1

    def finish(self, number: int) -> list[int]:
        """A request is done: its sequence stays for others. Returns the sequences to remove."""
        sequence = self._sequences[number]
        sequence.is_running = False
        sequence.last_used = next(self._clock)
        return list(self._evict_while(lambda: self.n_finished > self._n_cached))

    def drop(self, number: int) -> None:
        """Forget a sequence; the caller removes it."""
        self._release(number, 0)
        del self._sequences[number]
        self._unused.append(number)

    def make_room(self, n_tokens: int) -> list[int]:
        """Drop finished sequences until `n_tokens` more fit; returns those to remove."""
        return list(self._evict_while(lambda: self._n_free < n_tokens))

    def trim(self, n_tokens: int) -> list[int]:
        """Drop finished sequences until they have no more than `n_tokens` together."""

        def n_held() -> int:
            return sum(s.n_tokens for s in self._sequences.values() if not s.is_running)

        return list(self._evict_while(lambda: n_held() > n_tokens))

    def evict(self) -> int | None:
        """Drop the finished sequence that was not used for longest; None if there is none."""
        finished = [n for n, sequence in self._sequences.items() if not sequence.is_running]
        if not finished:
            return None
        oldest = min(finished, key=lambda number: self._sequences[number].last_used)
        sequence = self._sequences[oldest]
        self._on_evict(oldest, sequence.key, self._tokens[oldest, : sequence.n_tokens])
        self.drop(oldest)
        return oldest

    def drop_keys(self, is_unwanted: Callable[[Hashable], bool]) -> list[int]:
        """Drop the finished sequences of some keys; returns those to remove."""
        unwanted = [
            number
            for number, sequence in self._sequences.items()
            if not sequence.is_running and is_unwanted(sequence.key)
        ]
        for number in unwanted:
            self.drop(number)
        return unwanted

    def _evict_while(self, is_needed: Callable[[], bool]) -> Iterable[int]:
        while is_needed() and (number := self.evict()) is not None:
            yield number

    def _can_grow(self, source: int) -> bool:
        """Whether a new sequence can begin without dropping `source` itself."""
        return bool(self._unused) or any(
            not sequence.is_running and number != source
            for number, sequence in self._sequences.items()
        )

    def _new_number(self, source: int | None) -> tuple[int, tuple[int, ...]]:
        if self._unused:
            return self._unused.pop(), ()
        if source is not None:
            self._sequences[source].last_used = next(self._clock)
        number = self.evict()
        if number is None:
            raise ValueError("more running sequences than there are ids")
        self._unused.remove(number)
        return number, (number,)

    def _begin(self, start: Start, key: Hashable) -> Start:
        self._sequences[start.sequence] = _Sequence(key, start.n_kept, True, next(self._clock))
        return start

    def _release(self, number: int, n_keep: int) -> None:
        sequence = self._sequences[number]
        cells = self._cells[number, n_keep : sequence.n_tokens]
        self._n_owners[cells] -= 1
        freed = cells[self._n_owners[cells] == 0]
        self._free[self._n_free : self._n_free + len(freed)] = freed
        self._n_free += len(freed)
        sequence.n_tokens = n_keep
