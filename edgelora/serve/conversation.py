"""A conversation as a job: rendered, tokenised, with the grammar that its answer has to follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora.errors import EngineError, TemplateError
from edgelora.serve.jobs import Job
from edgelora.serve.openai_errors import bad_request
from edgelora.serve.preparing import check_limits, grammar_of, room, sampling_of
from edgelora.serve.routing import plain_prompt
from edgelora.serve.served import AUTO

if TYPE_CHECKING:
    from edgelora.serve.chat_schema import ResponseFormat
    from edgelora.serve.schema import GenerationBody
    from edgelora.serve.server import Server


@dataclass(frozen=True)
class Question:
    """What a conversation asks for, in the words of chat completions.

    Attributes:
        turns: messages as templates read them.
        format_param: where the request has its format, for messages.
    """

    turns: Sequence[Mapping[str, Any]]
    n: int
    max_tokens: int | None
    n_logprobs: int | None
    format: ResponseFormat | None
    messages_param: str
    format_param: str


@dataclass(frozen=True)
class Prepared:
    """A conversation as the job of its first answer.

    Attributes:
        plain: token ids of its text without the template, for model "auto".
    """

    job: Job
    plain: tuple[int, ...]


def prepare(server: Server, body: GenerationBody, asked: Question) -> Prepared:
    """Render, tokenise and check a conversation; for a worker thread, as it may take a while.

    Raises:
        ApiError: names the field at fault.
    """
    check_limits(server, body, asked.n)
    grammar = grammar_of(server, body, asked.format, asked.format_param)
    prompt = _prompt(server, asked.turns, asked.messages_param)
    n_ctx = server.scheduler.limits.n_ctx
    job = Job(
        prompt=prompt,
        max_tokens=room(
            len(prompt), asked.max_tokens, n_ctx, default=None, param=asked.messages_param
        ),
        sampling=sampling_of(server, body, grammar),
        stop=tuple(body.stop or ()),
        n_logprobs=asked.n_logprobs,
        ignore_eos=bool(body.ignore_eos),
    )
    is_auto = body.model == AUTO
    return Prepared(job, plain_prompt(server.model.vocabulary, asked.turns) if is_auto else ())


def _prompt(server: Server, turns: Sequence[Mapping[str, Any]], param: str) -> tuple[int, ...]:
    try:
        segments = server.template.render_chat(turns, None)
        return tuple(server.model.vocabulary.tokenize_segments(segments))
    except (TemplateError, EngineError) as error:
        raise bad_request(str(error), param) from error
