"""POST /v1/responses: its input items, tools and formats as records, for text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from edgelora.serve.chat_schema import ChatMessage, ResponseFormat, text_of
from edgelora.serve.openai_errors import bad_request
from edgelora.serve.schema import (
    INT31,
    Body,
    GenerationBody,
    JsonObject,
    Labels,
    Only,
    Text,
    ToolChoice,
    encodable,
    wrong,
)

LOGPROBS = "message.output_text.logprobs"
# There is no reasoning here, so nothing of it is left out.
_INCLUDED = (LOGPROBS, "reasoning.encrypted_content")


def _items(value: Any) -> Any:
    """The input as a list of messages and calls; a text is one user turn."""
    if isinstance(value, str):
        return [{"role": "user", "content": encodable(value)}]
    if not isinstance(value, list) or not value:
        raise wrong("must be a string or a list of items")
    return [_as_turn(item) for item in value]


def _as_turn(item: Any) -> Any:
    """An input item in the words of a chat message."""
    if not isinstance(item, dict):
        raise wrong("every item must be an object")
    kind = item.get("type", "message")
    if kind == "message":
        return item
    call = item.get("call_id")
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "tool_calls": [{"id": call, "function": function}]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": call, "content": text_of(item.get("output"))}
    raise wrong(f"items of type {str(kind)[:40]!r} are not supported by this server")


class Function(Body):
    """A function that the answer may call; other kinds of tools run on OpenAI's servers."""

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    def in_chat(self) -> dict[str, Any]:
        """The function as chat completions write it."""
        return {
            "type": "function",
            "function": self.model_dump(exclude={"type"}, exclude_none=True),
        }

    def shown(self) -> dict[str, Any]:
        """The function as a response repeats it."""
        return {**self.model_dump(), "strict": self.strict is not False}


class TextFormat(Body):
    """`text.format`: a schema is beside its name here, not in an object of its own."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Text | None = None
    description: Text | None = None
    json_schema: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """`text`: what kind of text the answer is."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, Only(("medium",))] = None


Input = Annotated[
    list[ChatMessage],
    BeforeValidator(_items),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "object"}, "minItems": 1},
            ]
        }
    ),
]


class ResponsesBody(GenerationBody):
    """POST /v1/responses. Nothing is stored: a conversation is sent whole each time."""

    input: Input
    instructions: Text | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=INT31)
    text: TextOptions | None = None
    tools: list[Function] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[Text] | None = None

    # Labels that change no answer.
    metadata: Labels | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    access_programs: Annotated[Any, Only()] = None
    background: Annotated[Any, Only((False,))] = None
    background_options: Annotated[Any, Only()] = None
    context_management: Annotated[Any, Only()] = None
    conversation: Annotated[Any, Only()] = None
    image: Annotated[Any, Only()] = None
    max_tool_calls: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    previous_response_id: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only()] = None
    prompt_cache_options: Annotated[Any, Only()] = None
    prompt_cache_retention: Annotated[Any, Only(("in_memory", "in-memory"))] = None
    reasoning: Annotated[Any, Only(({}, {"effort": "none"}, {"effort": None}))] = None
    service_tier: Annotated[Any, Only(("auto", "default"))] = None
    store: Annotated[Any, Only((False,))] = None
    truncation: Annotated[Any, Only(("disabled",))] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponsesBody:
        unknown = [name for name in self.include or [] if name not in _INCLUDED]
        if unknown:
            raise bad_request(f"{unknown[0][:60]!r} cannot be included", "include")
        format = self.text.format if self.text else None
        if format is not None and format.type == "json_schema" and format.json_schema is None:
            raise bad_request("a format of type json_schema needs a schema", "text.format.schema")
        if self.grammar and format is not None and format.type != "text":
            raise bad_request("'grammar' and 'text.format' exclude each other", "grammar")
        return self

    def n_alternatives(self) -> int | None:
        """`Job.n_logprobs`."""
        wanted = LOGPROBS in (self.include or []) or self.top_logprobs is not None
        return (self.top_logprobs or 0) if wanted else None

    def choice(self) -> str | dict[str, Any] | None:
        """The tool choice as chat completions write it."""
        choice: str | dict[str, Any] | None = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "function":
            return {"type": "function", "function": {"name": choice.get("name")}}
        return choice

    def turns(self) -> list[dict[str, Any]]:
        """The conversation as templates read it; calls that follow each other are one turn's."""
        turns = [message.plain() for message in self.input]
        if self.instructions:
            turns.insert(0, {"role": "system", "content": self.instructions})
        joined: list[dict[str, Any]] = []
        for turn in turns:
            if joined and "tool_calls" in turn and joined[-1]["role"] == "assistant":
                calls = joined[-1].get("tool_calls", []) + turn["tool_calls"]
                joined[-1] = {**joined[-1], "tool_calls": calls}
            else:
                joined.append(turn)
        return joined

    def format(self) -> ResponseFormat | None:
        """The wanted format in the words of chat completions."""
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type == "text":
            return None
        kind = "json_object" if wanted.type == "json_schema" else wanted.type
        return ResponseFormat.model_validate({"type": kind, "schema": wanted.json_schema})
