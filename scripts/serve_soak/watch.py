"""What the server holds when nobody asks: its private memory, and slots that must be free."""

from __future__ import annotations

import time

import psutil
from measure_memory import anonymous
from serve_benchmark.clients import counters, get

_FREE_WITHIN_S = 30.0


def memory(pid: int) -> int:
    """RssAnon of a server, in bytes."""
    size = anonymous(psutil.Process(pid))
    if not size:
        raise SystemExit("the server has ended")
    return size


def growth(before: int, after: int, most: float) -> str:
    """What is wrong with the memory at the end, "" if it is within a share `most` of before."""
    if abs(after - before) <= most * before:
        return ""
    return f"RssAnon went from {before} to {after} bytes"


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
