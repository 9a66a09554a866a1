"""POST /v1/responses: the newer shape of a conversation's next turn; nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from edgelora.serve.answering import ANSWERS, Numbered, answer_stream, answer_whole
from edgelora.serve.conversation import Question, prepare
from edgelora.serve.generation import Generation, Outcome
from edgelora.serve.jobs import Finished, Piece, Prefilled, TokenLogprob
from edgelora.serve.logprob_shapes import chat_logprobs
from edgelora.serve.openai_errors import ApiError, responses
from edgelora.serve.preparing import Target, choices, choose_model, envelope
from edgelora.serve.responses_schema import ResponsesBody
from edgelora.serve.streaming import named

if TYPE_CHECKING:
    from edgelora.serve.server import Server

router = APIRouter()


@router.post("/v1/responses", responses={**ANSWERS, **responses(404, 429)})
async def create_response(body: ResponsesBody, request: Request) -> Response:
    """Answer a conversation with a new assistant turn, in the Responses API's objects."""
    server: Server = request.app.state.server
    prepared = await run_in_threadpool(prepare, server, body, _question(body))
    target = await choose_model(server, body, [prepared.plain])
    generation = Generation(
        server.scheduler, [choices(prepared.job, target, 1)], streamed=bool(body.stream)
    )
    shape = _Shape(server, body, target, generation)
    if body.stream:
        return await answer_stream(request, generation, shape.stream, target.headers, shape.failed)
    return await answer_whole(request, generation, shape.whole, target.headers)


def _question(body: ResponsesBody) -> Question:
    return Question(
        turns=body.turns(),
        n=1,
        max_tokens=body.max_output_tokens,
        n_logprobs=body.n_alternatives(),
        format=body.format(),
        messages_param="input",
        format_param="text.format.schema",
    )


class _Shape:
    """Response objects, and the events by which one grows."""

    def __init__(
        self, server: Server, body: ResponsesBody, target: Target, generation: Generation
    ) -> None:
        common = envelope(server, target, "response", "resp_")
        self._fields = {
            "id": common["id"],
            "object": "response",
            "created_at": common["created"],
            "model": target.id,
            **_echoed(body),
            **target.extra,
        }
        self._generation = generation
        self._name = server.model.vocabulary.text_of
        self._message_id = f"msg_{secrets.token_hex(12)}"
        self._n_events = 0

    def whole(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """The finished response."""
        (outcome,) = outcomes
        assert outcome.finished is not None
        cut = outcome.finished.reason == "length"
        usage = self._generation.usage()
        return self._response(
            "incomplete" if cut else "completed",
            output=[self._message(outcome.text, outcome.tokens, cut=cut)],
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            completed_at=None if cut else int(time.time()),
            usage={
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        )

    async def stream(self, events: Numbered) -> AsyncGenerator[bytes, None]:
        """The Responses API's events, each with its number."""
        async for _, event in events:
            if isinstance(event, Piece):
                yield self._delta(event)
            elif isinstance(event, Prefilled):
                for opening in self._openings():
                    yield opening
            elif isinstance(event, Finished):
                for ending in self._endings():
                    yield ending

    def failed(self, error: ApiError) -> bytes:
        """What a stream ends with that could not be finished."""
        details = {"code": error.code or "server_error", "message": error.message}
        response = self._response("failed", error=details)
        return self._event("response.failed", response=response)

    def _openings(self) -> Iterator[bytes]:
        begun = self._response("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        item = {**self._item("in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._in_text("response.content_part.added", part=_part("", []))

    def _delta(self, piece: Piece) -> bytes:
        logprobs = self._logprobs(piece.tokens)
        return self._in_text("response.output_text.delta", delta=piece.text, logprobs=logprobs)

    def _endings(self) -> Iterator[bytes]:
        response = self.whole(self._generation.outcomes)
        (item,) = response["output"]
        (part,) = item["content"]
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._in_text("response.output_text.done", **done)
        yield self._in_text("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def _in_text(self, kind: str, **fields: Any) -> bytes:
        where = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        return self._event(kind, **where, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._n_events
        self._n_events += 1
        return named(kind, {"type": kind, "sequence_number": number, **fields})

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        unset: dict[str, Any] = {
            "output": [],
            "error": None,
            "incomplete_details": None,
            "completed_at": None,
            "usage": None,
        }
        return {**self._fields, "status": status, **unset, **fields}

    def _message(self, text: str, tokens: Sequence[TokenLogprob], *, cut: bool) -> dict[str, Any]:
        content = [_part(text, self._logprobs(tokens))]
        return {**self._item("incomplete" if cut else "completed"), "content": content}

    def _item(self, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self._message_id, "status": status, "role": "assistant"}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = chat_logprobs(tokens, self._name)["content"]
        return entries


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _echoed(body: ResponsesBody) -> dict[str, Any]:
    """The request's settings, which a response repeats."""
    format = body.text.format if body.text and body.text.format else None
    shown = format.model_dump(by_alias=True, exclude_none=True) if format else {"type": "text"}
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": shown},
        "tool_choice": body.tool_choice or "auto",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
