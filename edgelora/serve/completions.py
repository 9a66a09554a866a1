"""POST /v1/completions: texts or token ids continued, with echo and prompt log-probabilities."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from edgelora.serve.answering import ANSWERS, Numbered, answer_stream, answer_whole
from edgelora.serve.generation import Generation, Outcome
from edgelora.serve.jobs import Finished, Job, Piece, Prefilled, TokenLogprob
from edgelora.serve.logprob_shapes import LegacyLogprobs
from edgelora.serve.openai_errors import bad_request, responses
from edgelora.serve.preparing import (
    Target,
    check_limits,
    choices,
    choose_model,
    envelope,
    grammar_of,
    plain_ids,
    room,
    sampling_of,
)
from edgelora.serve.schema import CompletionBody
from edgelora.serve.streaming import DONE, data

if TYPE_CHECKING:
    from edgelora.engine.sampling import Sampling
    from edgelora.serve.server import Server

# OpenAI's default here; a chat's answer may take what is left of the context.
_MAX_TOKENS = 16

router = APIRouter()


@router.post("/v1/completions", responses={**ANSWERS, **responses(404, 429)})
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continue prompts as they are, without a chat template."""
    server: Server = request.app.state.server
    prompts = await run_in_threadpool(_prepare, server, body)
    target = await choose_model(server, body, [prompt.job.prompt for prompt in prompts])
    jobs = [choices(prompt.job, target, body.n or 1) for prompt in prompts]
    generation = Generation(server.scheduler, jobs, streamed=bool(body.stream))
    shape = _Shape(server, body, target, prompts, generation)
    if body.stream:
        return await answer_stream(request, generation, shape.stream, target.headers)
    return await answer_whole(request, generation, shape.whole, target.headers)


@dataclass(frozen=True)
class _Prompt:
    """A prompt as a job, as the text that echo shows, and where its first token begins there."""

    job: Job
    text: str
    start: int


def _prepare(server: Server, body: CompletionBody) -> list[_Prompt]:
    check_limits(server, body, body.n or 1)
    most = server.settings.limits.max_inputs
    if len(body.prompt) > most:
        raise bad_request(f"{len(body.prompt)} prompts, at most {most} are possible", "prompt")
    sampling = sampling_of(server, body, grammar_of(server, body, None, ""))
    return [_prepare_one(server, body, prompt, sampling) for prompt in body.prompt]


def _prepare_one(
    server: Server, body: CompletionBody, prompt: str | list[int], sampling: Sampling
) -> _Prompt:
    ids = plain_ids(server, prompt, "prompt")
    n_ctx = server.scheduler.limits.n_ctx
    job = Job(
        prompt=ids,
        max_tokens=room(len(ids), body.max_tokens, n_ctx, default=_MAX_TOKENS, param="prompt"),
        sampling=sampling,
        stop=tuple(body.stop or ()),
        n_logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        ignore_eos=bool(body.ignore_eos),
    )
    if not body.echo:
        return _Prompt(job, "", 0)
    decoded = server.model.vocabulary.decode(ids).decode("utf-8", "replace")
    if isinstance(prompt, str) and decoded.endswith(prompt):
        # SentencePiece puts a space before a text: it is the first token's, and not echoed.
        return _Prompt(job, prompt, len(prompt) - len(decoded))
    return _Prompt(job, decoded, 0)


class _Shape:
    """OpenAI's text_completion objects, whole and in chunks."""

    def __init__(
        self,
        server: Server,
        body: CompletionBody,
        target: Target,
        prompts: Sequence[_Prompt],
        generation: Generation,
    ) -> None:
        self._envelope = envelope(server, target, "text_completion", "cmpl-")
        self._generation = generation
        self._echo = bool(body.echo)
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._texts = [prompt.text for prompt in prompts for _ in range(body.n or 1)]
        name = server.model.vocabulary.text_of
        self._logprobs = [
            LegacyLogprobs(name, with_top=bool(body.logprobs), start=prompt.start)
            if body.logprobs is not None
            else None
            for prompt in prompts
            for _ in range(body.n or 1)
        ]

    def whole(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """All choices in one object."""
        return {
            **self._envelope,
            "choices": [self._choice(i, outcome) for i, outcome in enumerate(outcomes)],
            "usage": self._generation.usage(),
        }

    async def stream(self, events: Numbered) -> AsyncGenerator[bytes, None]:
        """A chunk for each piece of each choice."""
        async for index, event in events:
            if isinstance(event, Piece):
                yield self._chunk(index, event.text, event.tokens)
            elif isinstance(event, Prefilled) and self._echo:
                yield self._chunk(index, self._texts[index], event.prompt)
            elif isinstance(event, Finished):
                yield self._chunk(index, "", (), event.reason)
        if self._with_usage:
            yield data({**self._envelope, "choices": [], "usage": self._generation.usage()})
        yield DONE

    def _choice(self, index: int, outcome: Outcome) -> dict[str, Any]:
        assert outcome.prefilled is not None and outcome.finished is not None
        tokens = (*outcome.prefilled.prompt, *outcome.tokens)
        return {
            "text": self._texts[index] + outcome.text,
            "index": index,
            "logprobs": self._shaped(index, tokens),
            "finish_reason": outcome.finished.reason,
        }

    def _chunk(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenLogprob],
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "text": text,
            "index": index,
            "logprobs": self._shaped(index, tokens) if tokens else None,
            "finish_reason": finish_reason,
        }
        chunk = {**self._envelope, "choices": [choice]}
        if self._with_usage:
            chunk["usage"] = None
        return data(chunk)

    def _shaped(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        shape = self._logprobs[index]
        return None if shape is None else shape.shape(tokens)
