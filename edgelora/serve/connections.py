"""Connections that do not wait for ever: slow senders, slow readers and crowds are dropped."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgelora.serve.openai_errors import bad_request
from edgelora.serve.settings import Timeouts

logger = logging.getLogger("edgelora.serve")


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with three limits that it lacks.

    - A request must be whole within `request_s` of its first byte (or of the connection).
    - A client that reads nothing of its answer for `write_s` is cut off. The application sees a
      disconnect, as if the client had left; until then no more than the transport's buffer of
      64 KiB waits for it.
    - At most `max_connections` are open.
    """

    timeouts: ClassVar[Timeouts] = Timeouts()
    max_connections: ClassVar[int] = 512
    _request_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._drop("too many connections")
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all waiting."""
        for timer in (self._request_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request in."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Go on to the next request, part of which may be here already."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The client does not read as fast as the answer is made."""
        super().pause_writing()
        if self._write_timer is None:
            wait_s = self.timeouts.write_s
            self._write_timer = self.loop.call_later(wait_s, self._drop, "reads too slowly")

    def resume_writing(self) -> None:
        """It has read on."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if its last answer was never read."""
        if self.transport.get_write_buffer_size():
            self._drop("did not read its answer")
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has too large headers."""
        body = json.dumps(bad_request(msg).body()).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason="Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Let the timer of the request run exactly while a part of one is missing."""
        if self._is_waiting():
            if self._request_timer is None:
                wait_s = self.timeouts.request_s
                self._request_timer = self.loop.call_later(wait_s, self._drop, "sends too slowly")
        elif self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _is_waiting(self) -> bool:
        if self.conn.their_state is h11.IDLE:
            return self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY

    def _drop(self, why: str) -> None:
        logger.info("a connection of %s was dropped: %s", self.client, why)
        self.transport.abort()


def connection_class(timeouts: Timeouts, max_connections: int = 512) -> type[Connection]:
    """The protocol of a server with these limits."""
    limits = {"timeouts": timeouts, "max_connections": max_connections}
    return type("Connection", (Connection,), limits)
