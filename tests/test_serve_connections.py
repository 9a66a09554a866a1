"""Connections: slow senders, clients that do not read, crowds, and what is not HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serving import running_server, settings_of
from starlette.types import ASGIApp, Receive, Scope, Send

from edgelora.adapters.base import Base
from edgelora.serve.connections import connection_class
from edgelora.serve.lifecycle import Http
from edgelora.serve.settings import Timeouts
from edgelora.serve.sockets import open_socket, url_of


class Endless:
    """An application that sends until its client has left."""

    def __init__(self) -> None:
        self.n_sent = 0
        self.left = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()
        sending.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            self.n_sent += 65536
            await asyncio.sleep(0)


@contextlib.contextmanager
def serving_app(app: ASGIApp, base: Base, **settings: Any) -> Iterator[str]:
    """Serve any application as the server serves its own."""
    chosen = settings_of(base.path, **settings)
    with open_socket(chosen) as listening:
        http = Http(app, chosen)
        thread = threading.Thread(target=http.run, args=([listening],))
        thread.start()
        try:
            yield url_of(listening)
        finally:
            http.should_exit = http.force_exit = True
            thread.join()


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def test_slow_senders_are_dropped_and_others_are_not(base: Base) -> None:
    timeouts = Timeouts(request_s=0.5, keep_alive_s=1)
    begun = [
        b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc",
    ]  # fmt: skip
    with running_server(base.path, timeouts=timeouts) as url:
        slow = [connect(url) for _ in begun]
        for connection, data in zip(slow, begun, strict=True):
            connection.sendall(data)
        with httpx.Client() as steady:
            for _ in range(4):  # one connection, used for longer than a request may take
                assert steady.get(f"{url}/health").status_code == 200
                time.sleep(0.3)
        for connection in slow:
            with connection:
                assert is_closed(connection)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side ends it, within the socket's timeout."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_what_is_not_http_gets_an_openai_error(base: Base) -> None:
    too_large = b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"
    with serving_app(Endless(), base) as url:
        for data in (b"nonsense\r\n\r\n", too_large):
            with connect(url) as connection:
                connection.sendall(data)
                reply = b"".join(iter(lambda: connection.recv(4096), b""))
            assert reply.startswith(b"HTTP/1.1 400 ")
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] is None


def test_a_client_that_does_not_read_is_cut_off(base: Base) -> None:
    app = Endless()
    with serving_app(app, base, timeouts=Timeouts(write_s=0.3)) as url, connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert app.left.wait(20)
        # It was stopped by the first full buffers: nothing is gathered for who does not read.
        assert app.n_sent < 64 << 20


@pytest.mark.slow
def test_a_client_that_reads_in_bursts_is_not(base: Base) -> None:
    app = Endless()
    with serving_app(app, base, timeouts=Timeouts(write_s=2)) as url, connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(5):
            time.sleep(0.5)
            n_bytes = 0
            while n_bytes < 8 << 20:
                n_bytes += len(connection.recv(1 << 20))
        assert not app.left.is_set()


def test_a_crowd_is_turned_away(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    few = functools.partial(connection_class, max_connections=5)
    monkeypatch.setattr("edgelora.serve.lifecycle.connection_class", few)
    with serving_app(Endless(), base) as url, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(connect(url)) for _ in range(8)]
        assert is_closed(crowd[-1])
        for connection in crowd:
            connection.settimeout(0.2)
        assert sum(map(was_closed, crowd)) == 3


def was_closed(connection: socket.socket) -> bool:
    try:
        return is_closed(connection)
    except TimeoutError:
        return False
