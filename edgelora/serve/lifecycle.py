"""A server from its first signal of life to its exit code: run, drain, end, or fail."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from edgelora.errors import EdgeLoRAError, EngineError
from edgelora.serve.connections import connection_class
from edgelora.serve.server import Server
from edgelora.serve.settings import Settings
from edgelora.serve.sockets import url_of

# So long /health is red before a server whose engine has failed ends.
FAILURE_GRACE_S = 1.0
_FLUSH_S = 5
_MAX_HEADER_BYTES = 64 << 10
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Say = Callable[[str], None]


class Http(uvicorn.Server):
    """uvicorn without its own signals and logs.

    Args:
        on_signal: called for SIGINT and SIGTERM while it runs; None leaves them alone.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, on_signal: Callable[[int], None] | None = None
    ) -> None:
        self._on_signal = on_signal
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=connection_class(settings.timeouts),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(settings.timeouts.keep_alive_s),
            timeout_graceful_shutdown=_FLUSH_S,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals for the block; only the main thread may."""
        if self._on_signal is None:
            yield
            return
        handle = self._on_signal

        def on_signal(number: int, _frame: FrameType | None) -> None:
            handle(number)

        previous = {number: signal.signal(number, on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run(server: Server, listening: socket.socket, *, say: Say = lambda line: None) -> None:
    """Serve until a signal; returns when everything has ended in order.

    The first SIGINT or SIGTERM: no new requests (503), running ones finish within the drain
    timeout. A second one ends the process at once (exit code 128 + its number).

    Raises:
        EdgeLoRAError: the model could not be opened, or its engine has failed.
    """
    from edgelora.serve.app import create_app

    end = _End(server, say)
    end.http = Http(create_app(server), server.settings, end.on_signal)
    server.changed = end.on_change
    end.on_change()
    say(f"{url_of(listening)} has the page, and the API at /v1; Ctrl-C ends it")
    end.http.run([listening])
    if server.failure is not None:
        if isinstance(server.failure, EdgeLoRAError):
            raise server.failure
        raise EngineError(f"the engine has failed: {server.failure!r}") from server.failure
    if server.is_loading:
        # llama.cpp cannot be told to stop loading, and tearing it down beside that may crash.
        os._exit(0)


class _End:
    """What brings a server to its end."""

    http: Http

    def __init__(self, server: Server, say: Say) -> None:
        self._server = server
        self._say = say
        self._n_signals = 0

    def on_signal(self, number: int) -> None:
        self._n_signals += 1
        if self._n_signals > 1:
            os._exit(128 + number)
        threading.Thread(target=self._drain, name="edgelora-drain", daemon=True).start()

    def on_change(self) -> None:
        if self._server.state == "failed":
            threading.Thread(target=self._fail, name="edgelora-fail", daemon=True).start()

    def _drain(self) -> None:
        drain_s = self._server.settings.timeouts.drain_s
        self._say(f"ending: running requests have {drain_s:g} s; a second signal ends at once")
        if not self._server.drain(drain_s):
            self._say("some requests did not finish in time and were cut off")
        self.http.should_exit = True

    def _fail(self) -> None:
        if self._server.is_open:  # it has answered before: let clients see why it does not now
            time.sleep(FAILURE_GRACE_S)
        self.http.should_exit = True
