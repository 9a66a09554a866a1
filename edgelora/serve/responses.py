"""POST /v1/responses: the newer shape of a conversation's next turn; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from edgelora.serve.answering import ANSWERS, Numbered, answer_stream, answer_whole
from edgelora.serve.assistant import AssistantTurn
from edgelora.serve.conversation import Question, prepare
from edgelora.serve.generation import Generation, Outcome
from edgelora.serve.jobs import Finished, Piece, Prefilled, TokenLogprob
from edgelora.serve.logprob_shapes import chat_logprobs
from edgelora.serve.openai_errors import ApiError, responses
from edgelora.serve.preparing import Target, choices, choose_model, envelope
from edgelora.serve.response_items import Output, Told
from edgelora.serve.responses_schema import ResponsesBody
from edgelora.serve.streaming import named

if TYPE_CHECKING:
    from edgelora.serve.server import Server
    from edgelora.serve.tools import ToolPlan

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
    shape = _Shape(server, body, target, prepared.plan, generation)
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
        tools=[tool.in_chat() for tool in body.tools or ()],
        tool_choice=body.choice(),
        parallel_tool_calls=body.parallel_tool_calls,
        messages_param="input",
        format_param="text.format",
        schema_param="text.format.schema",
    )


class _Shape:
    """Response objects, and the events by which one grows."""

    def __init__(
        self,
        server: Server,
        body: ResponsesBody,
        target: Target,
        plan: ToolPlan,
        generation: Generation,
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
        self._turn = AssistantTurn(plan)
        self._output = Output()
        self._tokens: list[TokenLogprob] = []
        self._n_events = 0

    def whole(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """The finished response."""
        (outcome,) = outcomes
        assert outcome.finished is not None
        for _ in self._grown(Piece(outcome.text, tuple(outcome.tokens))):
            pass
        for _ in self._ended(outcome.finished):
            pass
        return self._finished(outcome.finished)

    async def stream(self, events: Numbered) -> AsyncGenerator[bytes, None]:
        """The Responses API's events, each with its number."""
        async for _, event in events:
            if isinstance(event, Piece):
                for kind, fields in self._grown(event):
                    yield self._event(kind, fields)
            elif isinstance(event, Prefilled):
                begun = {"response": self._response("in_progress")}
                yield self._event("response.created", begun)
                yield self._event("response.in_progress", begun)
            elif isinstance(event, Finished):
                for kind, fields in self._ended(event):
                    yield self._event(kind, fields)
                response = self._finished(event)
                yield self._event(f"response.{response['status']}", {"response": response})

    def failed(self, error: ApiError) -> bytes:
        """What a stream ends with that could not be finished."""
        details = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", {"response": self._response("failed", error=details)})

    def _grown(self, piece: Piece) -> Iterator[Told]:
        self._tokens += piece.tokens
        for part in self._turn.add(piece.text):
            yield from self._output.add(part, self._logprobs())

    def _ended(self, finished: Finished) -> Iterator[Told]:
        for part in self._turn.end():
            yield from self._output.add(part, self._logprobs())
        yield from self._output.end(self._logprobs(), cut=finished.reason == "length")

    def _finished(self, finished: Finished) -> dict[str, Any]:
        cut = finished.reason == "length"
        usage = self._generation.usage()
        return self._response(
            "incomplete" if cut else "completed",
            output=self._output.items,
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

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        unset: dict[str, Any] = {
            "output": [],
            "error": None,
            "incomplete_details": None,
            "completed_at": None,
            "usage": None,
        }
        return {**self._fields, "status": status, **unset, **fields}

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        number = self._n_events
        self._n_events += 1
        return named(kind, {"type": kind, "sequence_number": number, **fields})

    def _logprobs(self) -> list[dict[str, Any]]:
        """Those of the tokens since the last call."""
        shape = chat_logprobs(self._tokens, self._name)
        self._tokens = []
        entries: list[dict[str, Any]] = shape["content"]
        return entries


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
        "tools": [tool.shown() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
