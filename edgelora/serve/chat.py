"""POST /v1/chat/completions: a conversation's next turn, with tools and formats."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from edgelora.serve.answering import ANSWERS, Numbered, answer_stream, answer_whole
from edgelora.serve.assistant import AssistantTurn, Called, Said, finish_reason
from edgelora.serve.chat_schema import ChatBody
from edgelora.serve.conversation import Question, prepare
from edgelora.serve.generation import Generation, Outcome
from edgelora.serve.jobs import Finished, Piece, Prefilled, TokenLogprob
from edgelora.serve.logprob_shapes import chat_logprobs
from edgelora.serve.openai_errors import responses
from edgelora.serve.preparing import Target, choices, choose_model, envelope
from edgelora.serve.streaming import DONE, data

if TYPE_CHECKING:
    from edgelora.serve.server import Server
    from edgelora.serve.tools import ToolPlan

router = APIRouter()


@router.post("/v1/chat/completions", responses={**ANSWERS, **responses(404, 429)})
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answer a conversation with a new assistant turn."""
    server: Server = request.app.state.server
    prepared = await run_in_threadpool(prepare, server, body, _question(body))
    target = await choose_model(server, body, [prepared.plain])
    jobs = choices(prepared.job, target, body.n or 1)
    generation = Generation(server.scheduler, [jobs], streamed=bool(body.stream))
    shape = _Shape(server, body, target, prepared.plan, generation)
    if body.stream:
        return await answer_stream(request, generation, shape.stream, target.headers)
    return await answer_whole(request, generation, shape.whole, target.headers)


def _question(body: ChatBody) -> Question:
    return Question(
        turns=[message.plain() for message in body.messages],
        n=body.n or 1,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        n_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        format=body.response_format,
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        messages_param="messages",
        format_param="response_format",
        schema_param="response_format.json_schema.schema",
    )


class _Shape:
    """OpenAI's chat.completion objects, and the chunks of a stream."""

    def __init__(
        self,
        server: Server,
        body: ChatBody,
        target: Target,
        plan: ToolPlan,
        generation: Generation,
    ) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._envelope = envelope(server, target, kind, "chatcmpl-")
        self._plan = plan
        self._turns = [AssistantTurn(plan) for _ in range(body.n or 1)]
        self._tokens: list[list[TokenLogprob]] = [[] for _ in self._turns]
        self._generation = generation
        self._with_logprobs = bool(body.logprobs)
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._name = server.model.vocabulary.text_of

    def whole(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """All choices in one object."""
        return {
            **self._envelope,
            "choices": [self._choice(i, outcome) for i, outcome in enumerate(outcomes)],
            "usage": self._generation.usage(),
        }

    async def stream(self, events: Numbered) -> AsyncGenerator[bytes, None]:
        """The role first, then a chunk for each piece of each choice, then why it ended."""
        async for index, event in events:
            turn = self._turns[index]
            if isinstance(event, Piece):
                self._tokens[index] += event.tokens
                for part in turn.add(event.text):
                    yield self._chunk(index, _delta(part))
            elif isinstance(event, Prefilled):
                yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
            elif isinstance(event, Finished):
                for part in turn.end():
                    yield self._chunk(index, _delta(part))
                yield self._chunk(index, {}, finish_reason(event.reason, turn.n_calls))
        if self._with_usage:
            yield data({**self._envelope, "choices": [], "usage": self._generation.usage()})
        yield DONE

    def _choice(self, index: int, outcome: Outcome) -> dict[str, Any]:
        assert outcome.finished is not None
        answer = self._plan.parse(outcome.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.content,
            "refusal": None,
        }
        if answer.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function"}
                | {"function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.tool_calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(outcome.tokens) if self._with_logprobs else None,
            "finish_reason": finish_reason(outcome.finished.reason, len(answer.tool_calls)),
        }

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        """One chunk, with the log-probabilities of the tokens since the last."""
        tokens = self._tokens[index]
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": reason,
        }
        tokens.clear()
        chunk = {**self._envelope, "choices": [choice]}
        if self._with_usage:
            chunk["usage"] = None
        return data(chunk)

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return chat_logprobs(tokens, self._name)


def _delta(part: Said | Called) -> dict[str, Any]:
    """What a chunk adds to the message; the first of a call has its id and name."""
    if isinstance(part, Said):
        return {"content": part.text}
    call: dict[str, Any] = {"index": part.index}
    function = {"arguments": part.arguments}
    if part.id:
        call |= {"id": part.id, "type": "function"}
        function = {"name": part.name, **function}
    return {"tool_calls": [{**call, "function": function}]}
