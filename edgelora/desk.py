"""What a worker keeps open between calls: one base at a time, in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

How = TypeVar("How")
What = TypeVar("What")
Result = TypeVar("Result")

# A worker that has nothing to do gives the memory of the base back.
IDLE_S = 60.0


class Desk(Generic[How, What, Result]):
    """Calls what `open_work` opens, which stays open while it is asked for in the same way.

    One thread does all the work: a context of llama.cpp and a connection to SQLite belong to the
    thread that made them, and Dask calls from any.

    Args:
        open_work: called with how the work is done and a function that takes warnings.
    """

    def __init__(
        self,
        open_work: Callable[
            [How, Callable[[str], None]], AbstractContextManager[Callable[[What], Result]]
        ],
    ) -> None:
        self._open_work = open_work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edgelora-desk")
        self._stack = contextlib.ExitStack()
        self._opened: tuple[How, Callable[[What], Result]] | None = None
        self._warnings: list[str] = []
        self._n_calls = 0

    def call(self, how: How, what: What) -> tuple[Result, tuple[str, ...]]:
        """What the work makes of it, and what was said since it was opened."""
        return self._thread.submit(self._call, how, what).result()

    def _call(self, how: How, what: What) -> tuple[Result, tuple[str, ...]]:
        self._n_calls += 1
        try:
            return self._open(how)(what), tuple(self._warnings)
        finally:
            timer = threading.Timer(IDLE_S, self._rest, [self._n_calls])
            timer.daemon = True
            timer.start()

    def _open(self, how: How) -> Callable[[What], Result]:
        if self._opened is None or self._opened[0] != how:
            self._close()
            work = self._stack.enter_context(self._open_work(how, self._warnings.append))
            self._opened = how, work
        return self._opened[1]

    def _close(self) -> None:
        self._opened = None
        self._warnings.clear()
        self._stack.close()

    def _rest(self, n_calls: int) -> None:
        def close_if_idle() -> None:
            if self._n_calls == n_calls:
                self._close()

        with contextlib.suppress(RuntimeError):  # the process is ending
            self._thread.submit(close_if_idle)
