"""Grammars that can be read in ever more ways at once: llama.cpp follows all, and stands still."""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Code points from the first to the last; a class of them; characters one after another.
Ranges = tuple[tuple[int, int], ...]
Text = tuple[Ranges, ...]
# A sequence of items: a rule's number, or characters.
Alternative = list[int | Text]

MAX_WAYS = 1024  # llama.cpp compares each way with all others: 4,000 take seconds for one token
N_CHOICES = 32  # of a character in one trial, and as many more each time that its ways double
N_STARTS = 12
MAX_WORK = 400_000  # ways tried, in all


def find_growing(
    alternatives: Mapping[int, Sequence[Alternative]], named: Sequence[int]
) -> int | None:
    """A rule with a text that can be read in more than MAX_WAYS ways at once, if one is found.

    Only rules that contain themselves at two places with something behind can have one. For
    these, characters are chosen one by one that leave the most ways open. This finds what grows
    at every repetition; it is no proof that nothing grows.
    """
    reader = _Reader(alternatives)
    for symbol in _suspects(alternatives, named)[:N_STARTS]:
        for seed in range(2):
            if reader.grows(symbol, random.Random(seed)):
                return symbol
    return None


def _suspects(alternatives: Mapping[int, Sequence[Alternative]], named: Sequence[int]) -> list[int]:
    """Rules of recursions that come back in two ways: named ones first, one of each kind."""
    uses = [
        (symbol, item, i + 1 < len(alternative))
        for symbol, some in alternatives.items()
        for alternative in some
        for i, item in enumerate(alternative)
        if isinstance(item, int)
    ]
    if not uses:
        return []
    n = max(max(symbol, item) for symbol, item, _ in uses) + 1
    graph = coo_array(
        (np.ones(len(uses)), tuple(zip(*((a, b) for a, b, _ in uses), strict=True))), (n, n)
    )
    _, group = connected_components(graph.tocsr(), connection="strong")
    returns = collections.Counter(
        int(group[symbol])
        for symbol, item, behind in uses
        if behind and group[symbol] == group[item]
    )
    order = [*named, *(symbol for symbol in alternatives if symbol not in set(named))]
    first = {int(group[s]): s for s in reversed(order) if s < n and returns[int(group[s])] > 1}
    return list(first.values())


class _Reader:
    """llama.cpp's stacks (what may follow, innermost first) with a number for each."""

    def __init__(self, alternatives: Mapping[int, Sequence[Alternative]]) -> None:
        self.sequences = [alternative for some in alternatives.values() for alternative in some]
        numbers = iter(range(len(self.sequences)))
        self.of_rule = {
            symbol: [next(numbers) for _ in some] for symbol, some in alternatives.items()
        }
        # (sequence, item, character within the item, the stack behind); 0 is the empty stack.
        self.stacks: list[tuple[int, int, int, int]] = [(-1, 0, 0, 0)]
        self.numbers: dict[tuple[int, int, int, int], int] = {}
        self.known: dict[int, frozenset[int]] = {0: frozenset()}
        self.work = 0

    def grows(self, symbol: int, rng: random.Random) -> bool:
        """Whether the ways to read a text of this rule exceed MAX_WAYS."""
        ways = self._union(
            self._number(n, 0, 0, 0) for n in self.of_rule[symbol] if self.sequences[n]
        )
        n_choices = most = 0
        while n_choices <= N_CHOICES * (1 + most.bit_length()) and len(ways) <= MAX_WAYS:
            choices = [self._read(ways, code) for code in self._candidates(ways, rng)]
            if not any(choices) or self.work > MAX_WORK:
                return False
            most = max(map(len, choices))
            ways = rng.choice([one for one in choices if len(one) == most])
            n_choices += len(choices) > 1
        return len(ways) > MAX_WAYS

    def _candidates(self, ways: frozenset[int], rng: random.Random) -> list[int]:
        """Characters worth a try: the first of each class, the most frequent first."""
        counts = collections.Counter(first for way in ways for first, _ in self._class(way))
        order = sorted(counts, key=lambda code: (-counts[code], rng.random()))
        return order[: 12 if len(ways) <= 64 else 4]

    def _class(self, way: int) -> Ranges:
        sequence, i, j, _ = self.stacks[way]
        item = self.sequences[sequence][i]
        return () if isinstance(item, int) else item[j]

    def _read(self, ways: frozenset[int], code: int) -> frozenset[int]:
        self.work += len(ways)
        return self._union(
            self._after(way)
            for way in ways
            if any(first <= code <= last for first, last in self._class(way))
        )

    def _after(self, way: int) -> int:
        sequence, i, j, behind = self.stacks[way]
        item = self.sequences[sequence][i]
        if not isinstance(item, int) and j + 1 < len(item):
            return self._number(sequence, i, j + 1, behind)
        return self._next(sequence, i, behind)

    def _next(self, sequence: int, i: int, behind: int) -> int:
        if i + 1 < len(self.sequences[sequence]):
            return self._number(sequence, i + 1, 0, behind)
        return behind

    def _number(self, sequence: int, i: int, j: int, behind: int) -> int:
        key = (sequence, i, j, behind)
        if key not in self.numbers:
            self.numbers[key] = len(self.stacks)
            self.stacks.append(key)
        return self.numbers[key]

    def _union(self, stacks: Iterable[int]) -> frozenset[int]:
        return frozenset().union(*map(self._opened, stacks))

    def _opened(self, stack: int) -> frozenset[int]:
        """The stacks with characters on top that this one stands for."""
        if stack in self.known:
            return self.known[stack]
        found, todo, seen = set(), [stack], {stack}
        while todo:
            self.work += 1
            top = todo.pop()
            sequence, i, _, behind = self.stacks[top]
            if top == 0:
                continue
            item = self.sequences[sequence][i]
            if not isinstance(item, int):
                found.add(top)
                continue
            rest = self._next(sequence, i, behind)
            inner = (
                self._number(n, 0, 0, rest) if self.sequences[n] else rest
                for n in self.of_rule[item]
            )
            new = [one for one in inner if one not in seen]
            seen.update(new)
            todo += new
        self.known[stack] = frozenset(found)
        return self.known[stack]
