"""The server's private memory during the run, and what must be free at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import psutil
from measure_memory import anonymous
from serve_benchmark.clients import counters, get

_EVERY_S = 0.02  # several times while a tenth of a short run is answered
_FREE_WITHIN_S = 30.0
_WARM_UP = 0.25  # of the requests
_WINDOW = 0.1  # of the requests: memory is the least over so many


class MemoryWatch:
    """Reads the private memory of a process until the block ends.

    Attributes:
        samples: how many requests were done, and bytes.
    """

    def __init__(self, pid: int, n_done: Callable[[], int]) -> None:
        self.samples: list[tuple[int, int]] = []
        self._process = psutil.Process(pid)
        self._n_done = n_done
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_EVERY_S):
            self.samples.append((self._n_done(), anonymous(self._process)))


def growth(samples: Sequence[tuple[int, int]], n_requests: int, n_before: int) -> tuple[int, int]:
    """Memory after the warm-up and at the end of the run, in bytes.

    The warm-up is the first quarter of the requests, and at least `n_before`: by then all code has
    run and the caches are full. Each number is the least while a tenth of the requests
    was answered: what is kept. What an answer takes and gives back (30 MB where the logits of a
    prompt are wanted) lies above it half of the time.
    """
    warm, window = max(n_before, _WARM_UP * n_requests), _WINDOW * n_requests
    first = [size for n, size in samples if warm <= n < warm + window]
    last = [size for n, size in samples if n >= n_requests - window]
    if not first or not last:
        raise SystemExit("too few requests to tell memory after the warm-up from that at the end")
    return min(first), min(last)


def busy(port: int) -> str:
    """What still holds a slot or waits for one half a minute after the last client, "" if nothing.

    A server that is not healthy is told too.
    """
    until = time.monotonic() + _FREE_WITHIN_S
    while True:
        status, _ = get(port, "/ready")
        told = counters(port)
        names = ("llamacpp:requests_processing", "llamacpp:requests_deferred")
        held = {name: told.get(name, -1.0) for name in names}
        if status == 200 and not any(held.values()):
            return ""
        if time.monotonic() > until:
            return f"/ready answers {status}; {held}"
        time.sleep(0.1)
