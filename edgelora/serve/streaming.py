"""Answers sent as they are made (server-sent events), and clients that leave before the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class ClientGone(Exception):
    """The client has closed the connection; nobody reads an answer any more."""


def encode(message: Any) -> bytes:
    """JSON in UTF-8, without spaces."""
    return _json.encode(message).encode()


def data(message: dict[str, Any]) -> bytes:
    """One event of OpenAI's streams: a line of JSON."""
    return b"data: " + encode(message) + b"\n\n"


def named(event: str, message: dict[str, Any]) -> bytes:
    """One event with a name, as the Responses API sends them."""
    return b"event: " + event.encode() + b"\n" + data(message)


class EventStream(Response):
    """A stream of events that ends, and calls `close`, as soon as its client has gone."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; `close` is called however this ends."""
        try:
            with contextlib.suppress(ClientGone):
                await until_gone(receive, self._send_all(send))
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves before it is there.

    Raises:
        ClientGone: it has left.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
