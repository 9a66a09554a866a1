"""Who computes next and how much of it: turns of adapter sets, and the prompt tokens of a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence

QUANTUM_S = 0.15  # of one adapter set, while others have work too
MIXED_S = 0.25  # a batch in which somebody waits for the next token
ALONE_S = 1.0  # another batch with prompts: a request that comes waits for it
# llama.cpp's products take rows by 16, then by 4, then one by one, each time with all weights: on
# two cores a 1.1B model needs 0.11 s for 8 rows, 0.13 s for 16, 0.28 s for 30 and 0.27 s for 32.
ROWS = 16
_FIRST_ROWS = 64  # while the speed is not known


class Turns:
    """Adapter sets by turns, each for a quantum: changing the set has its cost.

    Args:
        quantum_s: a set keeps its turn for so long, and at least for one step.
    """

    def __init__(
        self, quantum_s: float = QUANTUM_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quantum_s = quantum_s
        self._clock = clock
        self._order: list[Hashable] = []
        self._started = 0.0

    def choose(self, present: Iterable[Hashable]) -> Hashable:
        """The key whose step is next; `present` are those with work, at least one."""
        keys = list(dict.fromkeys(present))
        current = self._order[0] if self._order else None
        self._order = [key for key in self._order if key in keys]
        self._order += [key for key in keys if key not in self._order]
        is_over = self._clock() - self._started >= self._quantum_s
        if self._order[0] == current and is_over:
            self._order.append(self._order.pop(0))
        if self._order[0] != current or is_over:
            self._started = self._clock()
        return self._order[0]


class RowSpeed:
    """How many rows of a batch take how long, learned from the batches (a moving average)."""

    def __init__(self) -> None:
        self._row_s: float | None = None

    def learn(self, n_rows: int, elapsed_s: float) -> None:
        """A batch of so many tokens, of prompts and of answers, took so long."""
        if n_rows >= ROWS:  # fewer are dearer, each by itself
            row_s = elapsed_s / n_rows
            self._row_s = row_s if self._row_s is None else 0.7 * self._row_s + 0.3 * row_s

    def n_rows_in(self, seconds: float) -> int:
        """Rows that take about so long, a multiple of ROWS."""
        if self._row_s is None:
            return _FIRST_ROWS
        return ROWS * max(1, round(seconds / max(self._row_s, 1e-9) / ROWS))


def prompt_tokens(n_rows: int, beside: int) -> int:
    """How many tokens of prompts go into a batch of `n_rows`, of which `beside` are of answers.

    Never less than half of ROWS: where answers leave no room, there are more rows.
    """
    least = ROWS * -(-(beside + ROWS // 2) // ROWS)
    return max(n_rows, least) - beside


def share(remaining: Sequence[int], budget: int) -> list[int]:
    """Divide a batch's prompt tokens among prompts, oldest first.

    Half is for the oldest, so that nobody starves; the rest goes to those with least left, so that
    a short prompt does not wait for a long one.
    """
    given = [0] * len(remaining)
    if remaining:
        given[0] = min(remaining[0], max(1, budget // 2))
    left = budget - sum(given)
    for i in sorted(range(len(remaining)), key=lambda i: (remaining[i] - given[i], i)):
        extra = min(remaining[i] - given[i], left)
        given[i] += extra
        left -= extra
    return given
