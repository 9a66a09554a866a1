"""Who computes next and how much of it: turns of adapter sets, and the prompt tokens of a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence

QUANTUM_S = 0.15  # of one adapter set, while others have work too
MIXED_S = 0.25  # a batch in which somebody waits for the next token
ALONE_S = 1.0  # a batch of prompts only: a cancelled one is noticed after it
MIN_CHUNK = 16
_FIRST_CHUNK = 64  # while the speed is not known


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


class PromptSpeed:
    """How many prompt tokens take how long, learned from the batches (a moving average)."""

    def __init__(self) -> None:
        self._token_s: float | None = None
        self._decode_s = 0.0

    def learn(self, n_prompt: int, n_decoding: int, elapsed_s: float) -> None:
        """A batch of so many tokens took so long."""
        if n_prompt == 0:
            self._decode_s = (
                elapsed_s if not self._decode_s else self._mix(self._decode_s, elapsed_s)
            )
        elif n_prompt >= MIN_CHUNK:
            # What the decoding sequences beside it take is not the prompt's, but never all of it.
            beside_s = min(self._decode_s if n_decoding else 0.0, elapsed_s / 2)
            token_s = (elapsed_s - beside_s) / n_prompt
            self._token_s = token_s if self._token_s is None else self._mix(self._token_s, token_s)

    def n_tokens_in(self, seconds: float) -> int:
        """Prompt tokens that fit; at least MIN_CHUNK."""
        if self._token_s is None:
            return _FIRST_CHUNK
        return max(MIN_CHUNK, int(seconds / max(self._token_s, 1e-9)))

    @staticmethod
    def _mix(old: float, new: float) -> float:
        return 0.7 * old + 0.3 * new


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
