"""A conversation as a job: rendered, tokenised, with the grammar that its answer has to follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora.errors import EngineError, SchemaError, TemplateError
from edgelora.serve.jobs import Job
from edgelora.serve.openai_errors import bad_request
from edgelora.serve.preparing import check_limits, grammar_of, room, sampling_of
from edgelora.serve.routing import plain_prompt
from edgelora.serve.served import AUTO
from edgelora.serve.tools import ToolPlan, plan_tools

if TYPE_CHECKING:
    from edgelora.serve.chat_schema import ResponseFormat
    from edgelora.serve.schema import GenerationBody
    from edgelora.serve.server import Server


@dataclass(frozen=True)
class Question:
    """What a conversation asks for, in the words of chat completions.

    Attributes:
        turns: messages as templates read them.
        messages_param, format_param, schema_param: where the request has its messages, its
            format and the schema in that, for error messages.
    """

    turns: Sequence[Mapping[str, Any]]
    n: int
    max_tokens: int | None
    n_logprobs: int | None
    format: ResponseFormat | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    messages_param: str
    format_param: str
    schema_param: str


@dataclass(frozen=True)
class Prepared:
    """A conversation as the job of its first answer.

    Attributes:
        plan: how calls of tools are told from text in what comes back.
        plain: token ids of its text without the template, for model "auto".
    """

    job: Job
    plan: ToolPlan
    plain: tuple[int, ...]


def prepare(server: Server, body: GenerationBody, asked: Question) -> Prepared:
    """Render, tokenise and check a conversation; for a worker thread, as it may take a while.

    Raises:
        ApiError: names the field at fault.
    """
    check_limits(server, body, asked.n)
    plan = _plan(server, asked)
    grammar = grammar_of(server, body, asked.format, asked.schema_param)
    if plan.grammar and grammar:
        param = "grammar" if body.grammar else asked.format_param
        raise bad_request(
            "the answer cannot follow this and call tools too: leave one out, "
            "or set tool_choice to 'none'",
            param,
        )
    prompt = _prompt(server, plan, asked)
    n_ctx = server.scheduler.limits.n_ctx
    job = Job(
        prompt=prompt,
        max_tokens=room(
            len(prompt), asked.max_tokens, n_ctx, default=None, param=asked.messages_param
        ),
        sampling=sampling_of(server, body, plan.grammar or grammar),
        stop=tuple(body.stop or ()),
        n_logprobs=asked.n_logprobs,
        ignore_eos=bool(body.ignore_eos),
    )
    is_auto = body.model == AUTO
    plain = plain_prompt(server.model.vocabulary, asked.turns) if is_auto else ()
    return Prepared(job, plan, plain)


def _plan(server: Server, asked: Question) -> ToolPlan:
    tools, most = asked.tools or (), server.settings.limits.max_tools
    if len(tools) > most:
        raise bad_request(f"{len(tools)} tools, at most {most} are possible", "tools")
    try:
        return plan_tools(
            asked.tools, asked.tool_choice, asked.parallel_tool_calls, template=server.template
        )
    except SchemaError as error:
        param = "tool_choice" if error.what.startswith("tool_choice") else "tools"
        raise bad_request(str(error), param, "invalid_tools") from error
    except TemplateError as error:
        raise bad_request(str(error), asked.messages_param, "template_error") from error


def _prompt(server: Server, plan: ToolPlan, asked: Question) -> tuple[int, ...]:
    try:
        segments = server.template.render_chat(plan.messages(asked.turns), plan.tools)
        return tuple(server.model.vocabulary.tokenize_segments(segments))
    except (TemplateError, EngineError) as error:
        raise bad_request(str(error), asked.messages_param, "template_error") from error
