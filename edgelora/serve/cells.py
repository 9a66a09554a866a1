"""What the KV cache holds and held: prefixes are found, shared, put aside and copied back."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence

from edgelora.engine.context import Context
from edgelora.serve.counters import Counters
from edgelora.serve.jobs import Limits
from edgelora.serve.memory import token_bytes
from edgelora.serve.prefixes import Prefixes, Tokens
from edgelora.serve.stored import Entry, Stored

# Every row looks at every cell up to the last in use (flash attention skips those of others, but
# one by one): on two cores a thousand of them cost a 1.1B model 1 % of its speed and SmolLM2 4 %,
# and several times that where many requests run. They stay only if memory cannot hold many of them.
_MAX_FINISHED = 1024
_ROOMY = 4 * _MAX_FINISHED
_WORTH_LOADING = 16  # tokens more than the KV cache itself shares


class Cells:
    """The sequences of one context, kept in step with the book-keeping of `Prefixes`.

    Finished sequences that leave the KV cache go into memory, and come back when a prompt begins
    as they did. Not for models whose layers see a window: llama.cpp saves only what is in it.
    """

    def __init__(self, context: Context, limits: Limits, counters: Counters) -> None:
        windows = context.model.has_windows
        self.stored = Stored(0 if windows or not limits.n_cached_sequences else limits.cache_bytes)
        self.prefixes = Prefixes(
            context.n_sequences,
            limits.n_ctx,
            limits.n_cells,
            limits.n_cached_sequences,
            self._put_aside,
        )
        n_storable = limits.cache_bytes / token_bytes(context.model.base, limits.kv_type)
        is_roomy = not self.stored.is_off and n_storable >= _ROOMY
        self._most_finished = 0 if is_roomy else _MAX_FINISHED
        self._context = context
        self._counters = counters

    def n_known(self, key: Hashable, prompt: Tokens) -> int:
        """Tokens of a prompt that need not be computed if it begins now."""
        return max(self.prefixes.longest(key, prompt)[1], self.stored.longest(key, prompt)[1])

    def begin(self, key: Hashable, prompt: Tokens, *, reuse: bool) -> tuple[int, int]:
        """A sequence for a prompt, and how many of the prompt's tokens it has already."""
        if reuse:
            entry, n_stored = self.stored.longest(key, prompt)
            n_there = self.prefixes.longest(key, prompt)[1]
            if entry is not None and n_stored > n_there + _WORTH_LOADING:
                self._load(entry, n_stored)
        start = self.prefixes.start(key, prompt, reuse=reuse)
        self._remove(start.dropped)
        if start.source is not None:
            self._context.copy_sequence(start.source, start.sequence, start.n_kept)
        elif start.truncate:
            self._context.truncate(start.sequence, start.n_kept)
        self._remove(self.prefixes.trim(self._most_finished))
        return start.sequence, start.n_kept

    def finish(self, number: int) -> None:
        """A request is done; its sequence stays for others."""
        self._remove(self.prefixes.finish(number))

    def drop(self, number: int) -> None:
        """Forget a sequence, which may be incomplete."""
        self.prefixes.drop(number)
        self._context.remove_sequence(number)

    def make_room(self, n_tokens: int) -> None:
        """Free cells for so many tokens, if finished sequences have them."""
        self._remove(self.prefixes.make_room(n_tokens))

    def evict(self) -> bool:
        """Free the cells of one finished sequence; whether there was one."""
        number = self.prefixes.evict()
        if number is not None:
            self._context.remove_sequence(number)
        return number is not None

    def forget(self, is_unwanted: Callable[[Hashable], bool]) -> None:
        """Drop the finished sequences of some adapter sets."""
        self._remove(self.prefixes.drop_keys(is_unwanted))
        self.stored.drop_keys(is_unwanted)

    def _load(self, entry: Entry, n_common: int) -> None:
        """Copy an entry back, as a finished sequence."""
        started_s = time.perf_counter()
        start = self.prefixes.start(entry.key, entry.tokens, reuse=False)
        self._remove(start.dropped)
        self.make_room(len(entry.tokens))
        if self._context.load_sequence(start.sequence, entry.data):
            self.prefixes.extend(start.sequence, entry.tokens)
            self.stored.use(entry, n_common)
            self.finish(start.sequence)
        else:
            self.drop(start.sequence)
        self._counters.copy_s += time.perf_counter() - started_s

    def _put_aside(self, number: int, key: Hashable, tokens: Tokens) -> None:
        if self.stored.is_off or len(tokens) < _WORTH_LOADING:
            return
        started_s = time.perf_counter()
        data = self._context.save_sequence(number)
        self.stored.add(Entry(key, tokens.copy(), data))
        self._counters.copy_s += time.perf_counter() - started_s

    def _remove(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._context.remove_sequence(number)
