"""What each arm costs; what several arms need is computed once and charged to each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Bill:
    """Costs of one piece of work.

    Attributes:
        tokens: forward-equivalent: a token of a forward pass is one, of a gradient pass three.
        cpu_s, wall_s: of this process; without those of other pieces that it waited for.
        parts: shared pieces that it used, by name.
    """

    tokens: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    parts: dict[str, Bill] = field(default_factory=dict)

    def total(self) -> Bill:
        """With all parts, each once."""
        all_ = [self, *self.parts.values()]
        return Bill(
            sum(bill.tokens for bill in all_),
            sum(bill.cpu_s for bill in all_),
            sum(bill.wall_s for bill in all_),
        )


class Meter:
    """Bills of arms. Work is nested: time goes to the innermost piece that is open."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Bill]] = {}
        self._open: list[Bill] = []

    @contextmanager
    def billing(self) -> Iterator[Bill]:
        """A bill for the block, to be read after it."""
        bill = Bill()
        self._open.append(bill)
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield bill
        finally:
            cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
            self._open.pop()
            bill.cpu_s += cpu_s
            bill.wall_s += wall_s
            if self._open:
                self._open[-1].cpu_s -= cpu_s
                self._open[-1].wall_s -= wall_s

    def spend(self, n_tokens: int) -> None:
        """Put forward-equivalent tokens on the innermost bill."""
        self._open[-1].tokens += n_tokens

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returned the first time; whoever asks for it is charged for it."""
        if name not in self._kept:
            with self.billing() as bill:
                value = make()
            self._kept[name] = value, bill
        value, bill = self._kept[name]
        self._open[-1].parts |= {name: bill, **bill.parts}
        return value
