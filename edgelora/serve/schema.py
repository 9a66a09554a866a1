"""What requests may say: fields, their types and ranges, and those that are known and refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from edgelora.serve.openai_errors import bad_request

INT31 = 2**31  # whatever counts tokens or choices is less
_INT64 = 2**63
_DEPTH = 64


def wrong(message: str) -> PydanticCustomError:
    """A finding of a validator; the message is what the client reads."""
    return PydanticCustomError("invalid_value", "{reason}", {"reason": message})


@dataclass(frozen=True, eq=False)  # typing takes equal annotations for one, and 0 equals False
class Only:
    """A field that is known and not supported: any value but null and these is refused."""

    accepted: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [None, *self.accepted], "description": "Known, not supported."}

    def _check(self, value: Any) -> None:
        # By type too, for 1 == True.
        if value is None or any(type(value) is type(a) and value == a for a in self.accepted):
            return
        usual = f"anything but {self.accepted[0]!r} is " if self.accepted else ""
        raise wrong(f"{usual}not supported by this server")


def encodable(value: Any) -> Any:
    """A JSON value as it is, unless it cannot be written as JSON again.

    Refused are strings with lone surrogates, NaN and infinity, and nesting past `_DEPTH`, which
    whatever walks the value would pay with its own stack.
    """
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            _refuse_surrogates(item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise wrong("NaN and infinity are no numbers of JSON")
        elif isinstance(item, dict | list):
            if depth > _DEPTH:
                raise wrong(f"nested more than {_DEPTH} deep")
            inner = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            pending += [(child, depth + 1) for child in inner]
    return value


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise wrong("a string with a lone surrogate is not valid Unicode") from error


def _stop_strings(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong("must be a string or a list of strings")
    if "" in stops:
        raise wrong("must not contain an empty string")
    return [encodable(stop) for stop in stops]


def _text_or_object(value: Any) -> Any:
    if not isinstance(value, str | dict | None):
        raise wrong("must be a string or an object")
    return encodable(value)


def _biases(value: dict[str, float] | None) -> dict[str, float] | None:
    for token in value or {}:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise wrong(f"{token[:20]!r} is not a token id: the keys are ids as strings")
    return value


Text = Annotated[str, AfterValidator(encodable)]
Labels = Annotated[dict[str, str], AfterValidator(encodable)]
JsonObject = Annotated[dict[str, Any], AfterValidator(encodable)]
ToolChoice = Annotated[
    Any,
    BeforeValidator(_text_or_object),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]}),
]
Stop = Annotated[
    list[str] | None,
    BeforeValidator(_stop_strings),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}},
                {"type": "null"},
            ]
        }
    ),
]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """A request's body: nothing is converted between types, and unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class LoraField(Body):
    """One adapter of the set that answers, and its weight."""

    name: Text
    scale: float = 1.0


class ModelBody(Body):
    """Which model answers: its id, or the base with exactly the adapters in `lora`."""

    model: Text | None = None
    lora: list[LoraField] | None = None
    user: Text | None = None

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> ModelBody:
        if self.lora and self.model == "auto":
            raise bad_request("'lora' names the adapters and model 'auto' chooses them", "lora")
        return self


class StreamOptions(Body):
    """What a stream carries beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only((False,))] = None


class GenerationBody(ModelBody):
    """How an answer is drawn; the fields that all three ways to ask for one share.

    top_k, min_p, repeat_penalty, ignore_eos and grammar carry llama-server's names.
    """

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=INT31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repeat_penalty: float | None = Field(default=None, ge=0.01, le=10)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Bias] | None, AfterValidator(_biases)] = None
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    grammar: Text | None = None
    ignore_eos: bool | None = None

    # Of other servers, where they change the answer: refused rather than ignored.
    mirostat: Annotated[Any, Only((0,))] = None
    typical_p: Annotated[Any, Only((1, 1.0))] = None
    dynatemp_range: Annotated[Any, Only((0, 0.0))] = None
    dry_multiplier: Annotated[Any, Only((0, 0.0))] = None
    xtc_probability: Annotated[Any, Only((0, 0.0))] = None
    n_probs: Annotated[Any, Only((0,))] = None
    min_tokens: Annotated[Any, Only((0,))] = None
    length_penalty: Annotated[Any, Only((1, 1.0))] = None
    use_beam_search: Annotated[Any, Only((False,))] = None
    stop_token_ids: Annotated[Any, Only(([],))] = None
    bad_words: Annotated[Any, Only(([],))] = None
    guided_json: Annotated[Any, Only()] = None
    guided_regex: Annotated[Any, Only()] = None
    guided_choice: Annotated[Any, Only()] = None
    guided_grammar: Annotated[Any, Only()] = None
    structured_outputs: Annotated[Any, Only()] = None
    json_schema: Annotated[Any, Only()] = None
    chat_template: Annotated[Any, Only()] = None
    chat_template_kwargs: Annotated[Any, Only(({},))] = None
    continue_final_message: Annotated[Any, Only((False,))] = None
    add_generation_prompt: Annotated[Any, Only((True,))] = None

    @model_validator(mode="after")
    def _consistent(self) -> GenerationBody:
        penalties = {self.repeat_penalty, self.repetition_penalty} - {None}
        if len(penalties) > 1:
            raise bad_request(
                "'repeat_penalty' and 'repetition_penalty' are one setting: give one",
                "repetition_penalty",
            )
        if self.stream_options is not None and not self.stream:
            raise bad_request(
                "'stream_options' is only allowed when 'stream' is true", "stream_options"
            )
        return self


def _prompts(value: Any) -> Any:
    """A prompt in any of OpenAI's four shapes as a list of texts or of lists of token ids."""
    if isinstance(value, str):
        return [encodable(value)]
    if not isinstance(value, list) or not value:
        raise wrong("must be a string, a list of strings, a list of token ids or a list of those")
    if all(type(item) is int for item in value):
        return [value]
    if all(isinstance(item, str) for item in value):
        return [encodable(item) for item in value]
    if all(isinstance(item, list) and item and _are_ids(item) for item in value):
        return value
    raise wrong(
        "must hold strings only, token ids only, or non-empty lists of token ids only; "
        "they cannot be mixed"
    )


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompts = Annotated[
    Any,
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0, lt=INT31)
    n: int | None = Field(default=None, ge=1, lt=INT31)
    best_of: int | None = Field(default=None, ge=1, lt=INT31)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    suffix: Annotated[Any, Only(("",))] = None
    response_format: Annotated[Any, Only(({"type": "text"},))] = None

    @model_validator(mode="after")
    def _no_best_of(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise bad_request("'best_of' other than 'n' is not supported", "best_of")
        return self


class EmbeddingBody(ModelBody):
    """POST /v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, lt=INT31)
