"""POST /v1/chat/completions: its messages, tools and formats as records."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

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

_SCHEMA_PARAM = "response_format.json_schema"  # where pydantic would name the Python attribute
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def text_of(value: Any) -> str | None:
    """Content as one text: a string, or text parts with a line break between two of them."""
    if value is None or isinstance(value, str):
        return encodable(value)  # type: ignore[no-any-return]
    if not isinstance(value, list):
        raise wrong("must be a string or a list of text parts")
    return "\n".join(_part_text(part) for part in value)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise wrong("every content part must be an object with a 'type'")
    if kind not in _TEXT_PARTS:
        raise wrong(f"content parts of type {kind[:40]!r} are not supported: this model reads text")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise wrong(f"a content part of type {kind!r} must have a string in {_TEXT_PARTS[kind]!r}")
    return str(encodable(text))


Content = Annotated[
    str | None,
    BeforeValidator(text_of),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]


class CalledFunction(Body):
    """A function that an assistant called, its arguments as a JSON text."""

    name: Text
    arguments: Text


class CalledTool(Body):
    """One call in an assistant's turn."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[CalledTool] | None = None
    content: Content = Field(default=None, validate_default=True)
    name: Text | None = None
    tool_call_id: Text | None = Field(default=None, validate_default=True)
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None

    @field_validator("tool_calls")
    @classmethod
    def _called_by_the_assistant(
        cls, calls: list[CalledTool] | None, info: ValidationInfo
    ) -> list[CalledTool] | None:
        if calls and info.data.get("role", "assistant") != "assistant":
            raise wrong("only an assistant message has tool calls")
        return calls

    @field_validator("content")
    @classmethod
    def _said_or_called(cls, content: str | None, info: ValidationInfo) -> str | None:
        if content is None and not info.data.get("tool_calls", "invalid"):
            raise wrong("a message without tool calls must have content")
        return content

    @field_validator("tool_call_id")
    @classmethod
    def _names_its_call(cls, call: str | None, info: ValidationInfo) -> str | None:
        if call is None and info.data.get("role") == "tool":
            raise wrong("a tool message must name the call that it answers")
        return call

    def plain(self) -> dict[str, Any]:
        """The turn as templates read it; a developer's instructions are the system's."""
        turn: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


class NamedSchema(Body):
    """A JSON schema that the answer has to follow; it is always enforced, `strict` or not."""

    name: Text | None = None
    description: Text | None = None
    json_schema: JsonObject = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What kind of text the answer is; `schema` beside json_object is llama-server's form."""

    type: Literal["text", "json_object", "json_schema"]
    named: NamedSchema | None = Field(default=None, alias="json_schema", validate_default=True)
    json_schema: JsonObject | None = Field(default=None, alias="schema")

    @field_validator("named")
    @classmethod
    def _has_its_schema(cls, named: NamedSchema | None, info: ValidationInfo) -> NamedSchema | None:
        if named is None and info.data.get("type") == "json_schema":
            raise bad_request("the type json_schema needs 'json_schema'", _SCHEMA_PARAM)
        return named

    def wanted_schema(self) -> dict[str, Any] | None:
        """The schema that the answer has to follow, where there is one."""
        return self.json_schema if self.named is None else self.named.json_schema


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, lt=INT31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=INT31)
    n: int | None = Field(default=None, ge=1, lt=INT31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[JsonObject] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None

    # Labels that change no answer.
    metadata: Labels | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    functions: Annotated[Any, Only(([],))] = None
    modalities: Annotated[Any, Only((["text"],))] = None
    moderation: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    prompt_cache_options: Annotated[Any, Only()] = None
    prompt_cache_retention: Annotated[Any, Only(("in_memory", "in-memory"))] = None
    reasoning_effort: Annotated[Any, Only(("none",))] = None
    service_tier: Annotated[Any, Only(("auto", "default"))] = None
    store: Annotated[Any, Only((False,))] = None
    verbosity: Annotated[Any, Only(("medium",))] = None
    web_search_options: Annotated[Any, Only()] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise bad_request(
                "'max_tokens' and 'max_completion_tokens' are one setting: give one", "max_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise bad_request("'top_logprobs' needs 'logprobs' to be true", "top_logprobs")
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.grammar:
            raise bad_request("'grammar' and 'response_format' exclude each other", "grammar")
        return self
