"""A real server for tests: the application over a pico base, on a free port of this machine.

    with running_server(base, [adapter]) as url:
        httpx.get(f"{url}/v1/models")

The process is the test's own: uvicorn runs in a thread, the engine in another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.serve.app import create_app
from edgelora.serve.lifecycle import Http
from edgelora.serve.server import Server, open_server
from edgelora.serve.settings import Settings
from edgelora.serve.sockets import open_socket, url_of

# What a pico model needs: little of everything, so that tests may start many servers.
SMALL = {"n_slots": 2, "n_ctx": 256, "n_batch": 64, "n_threads": 1, "port": 0}


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`."""

    url: str
    server: Server


def settings_of(base: Path, adapters: Sequence[Path] = (), **settings: Any) -> Settings:
    """Settings for a pico base; what is given wins."""
    return Settings(base=base, adapters=tuple(adapters), **(SMALL | settings))


@contextlib.contextmanager
def running_server(base: Path, adapters: Sequence[Path] = (), **settings: Any) -> Iterator[str]:
    """Start a server, wait until it is ready, yield its URL, stop it."""
    with running(base, adapters, **settings) as started:
        yield started.url


@contextlib.contextmanager
def running(
    base: Path, adapters: Sequence[Path] = (), *, wait: bool = True, **settings: Any
) -> Iterator[Running]:
    """`running_server` with the server's own object; with `wait` false it may still be loading."""
    chosen = settings_of(base, adapters, **settings)
    with open_server(chosen) as server, open_socket(chosen) as listening:
        http = Http(create_app(server), chosen)
        thread = threading.Thread(target=http.run, args=([listening],), name="test-http")
        thread.start()
        try:
            if wait:
                server.wait(60.0)
            yield Running(url_of(listening), server)
        finally:
            http.should_exit = True
            thread.join()
