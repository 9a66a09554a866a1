"""A generation as an HTTP answer: whole, or streamed; either ends when its client has gone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edgelora.errors import EngineError, InvalidGrammar
from edgelora.serve.generation import Generation, Outcome
from edgelora.serve.jobs import Event
from edgelora.serve.openai_errors import ApiError, bad_request, to_api_error
from edgelora.serve.streaming import ClientGone, EventStream, data, encode, until_gone

Numbered = AsyncGenerator[tuple[int, Event], None]
# For the OpenAPI document: what a route that may stream answers with. `itemSchema` says what one
# event is (OpenAPI 3.2; FastAPI's own streams say it in documents of 3.1 too).
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer: an object, or with `stream` its events one after another.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"itemSchema": _EVENT},
        },
    }
}
_CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is what the log and the metrics count


async def answer_whole(
    request: Request,
    generation: Generation,
    render: Callable[[list[Outcome]], dict[str, Any]],
    headers: dict[str, str],
) -> Response:
    """Wait for all choices and answer with what `render` makes of them."""

    async def work() -> bytes:
        return encode(render(await generation.collect()))

    try:
        _start(generation)
        return await whole_or_gone(request, work(), headers)
    finally:
        generation.cancel()


async def whole_or_gone(
    request: Request, work: Coroutine[Any, Any, bytes], headers: dict[str, str] | None = None
) -> Response:
    """The JSON that `work` gives as an answer; it is cancelled when the client leaves."""
    try:
        body = await until_gone(request.receive, work)
    except ClientGone:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    return Response(body, headers=headers, media_type="application/json")


async def answer_stream(
    request: Request,
    generation: Generation,
    render: Callable[[Numbered], AsyncGenerator[bytes, None]],
    headers: dict[str, str],
    render_error: Callable[[ApiError], bytes] = lambda error: data(error.body()),
) -> Response:
    """Begin a stream once the first prompt is computed; until then an error has its own status."""
    events = generation.events()
    try:
        _start(generation)
        first = await until_gone(request.receive, _next(events))
    except BaseException as error:
        generation.cancel()
        if isinstance(error, ClientGone):
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        raise
    resumed = _resumed(first, events)
    stream = _ending_with_error(render(resumed), (events, resumed), render_error)
    return EventStream(stream, generation.cancel, headers)


def _start(generation: Generation) -> None:
    """Submit the first jobs; nothing is computed yet, so what the engine refuses is the request."""
    try:
        generation.start()
    except InvalidGrammar:
        raise
    except EngineError as error:
        raise bad_request(str(error)) from error


async def _next(events: Numbered) -> tuple[int, Event]:
    return await anext(events)


async def _resumed(first: tuple[int, Event], events: Numbered) -> Numbered:
    yield first
    async for event in events:
        yield event


async def _ending_with_error(
    stream: AsyncGenerator[bytes, None],
    sources: Sequence[AsyncGenerator[Any, None]],
    render_error: Callable[[ApiError], bytes],
) -> AsyncGenerator[bytes, None]:
    """The stream; the status has been sent, so an error is the last event of the stream."""
    try:
        async with contextlib.AsyncExitStack() as closing:
            for generator in (*sources, stream):
                await closing.enter_async_context(contextlib.aclosing(generator))
            async for event in stream:
                yield event
    except Exception as error:
        yield render_error(to_api_error(error))
