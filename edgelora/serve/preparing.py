"""What a request asks for, checked and turned into what the scheduler takes."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgelora.datasets.segments import Segment
from edgelora.engine.grammar import JSON_OBJECT_GBNF, json_schema_to_gbnf
from edgelora.engine.sampling import Sampling, check_grammar
from edgelora.errors import EngineError, InvalidGrammar, SchemaError
from edgelora.serve.jobs import AdapterSet, Job
from edgelora.serve.openai_errors import bad_request
from edgelora.serve.served import AUTO

if TYPE_CHECKING:
    from edgelora.serve.chat_schema import ResponseFormat
    from edgelora.serve.schema import GenerationBody, ModelBody
    from edgelora.serve.server import Server

# llama.cpp's seeds have 32 bits, and the largest one asks it for a random seed.
_SEEDS = 2**32 - 1


@dataclass(frozen=True)
class Target:
    """Which model answers.

    Attributes:
        extra: fields beside OpenAI's in the body, and the headers that say the same.
    """

    id: str
    adapters: AdapterSet
    extra: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


async def choose_model(server: Server, body: ModelBody, plain: Sequence[tuple[int, ...]]) -> Target:
    """The model that the request names, or for "auto" the one that its prompt asks for.

    Args:
        plain: token ids of each prompt's text without a template, which "auto" goes by.

    Raises:
        ModelNotFound, InvalidAdapterSet: as `Registry.resolve`.
        Uncalibrated: "auto", and the adapters here have nothing that it could go by.
        ApiError: "auto" for several prompts, which may ask for different adapters.
    """
    model_id, adapters = server.registry.resolve(body.model, body.lora)
    if model_id != AUTO:
        return Target(model_id, adapters)
    if server.router is None or len(plain) != 1 or not plain[0]:
        raise bad_request("model 'auto' takes one prompt in a request, with text in it", "model")
    choice = await server.router.choose(plain[0])
    details = {
        "adapter": choice.id,
        "similarity": choice.similarity,
        "threshold": choice.threshold,
    }
    headers = {"X-EdgeLoRA-Adapter": choice.id}
    return Target(choice.id, choice.adapters, {"edgelora": details}, headers)


def envelope(server: Server, target: Target, kind: str, prefix: str) -> dict[str, Any]:
    """The fields that every answer and every chunk of it begins with."""
    return {
        "id": f"{prefix}{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": target.id,
        "system_fingerprint": f"fp_{server.model.base.identity.id}",
        **target.extra,
    }


def plain_ids(server: Server, prompt: str | Sequence[int], param: str) -> tuple[int, ...]:
    """Token ids of a text outside of any template, or given ids once they are checked.

    Raises:
        ApiError: no tokens at all, or an id that is not the vocabulary's.
    """
    vocabulary = server.model.vocabulary
    if isinstance(prompt, str):
        try:
            ids = tuple(vocabulary.tokenize_segments([Segment(prompt, False)] if prompt else []))
        except EngineError as error:
            raise bad_request(str(error), param) from error
    else:
        ids = tuple(prompt)
        bad = next((i for i in ids if not 0 <= i < vocabulary.n_tokens), None)
        if bad is not None:
            last = vocabulary.n_tokens - 1
            raise bad_request(
                f"{str(bad)[:20]} is not a token id of this model (0 to {last})", param
            )
    if not ids:
        raise bad_request(f"'{param}' is empty: there is nothing to read", param)
    return ids


def room(n_prompt: int, asked: int | None, n_ctx: int, *, default: int | None, param: str) -> int:
    """How many tokens the answer may have; without a number of its own, `default` or what fits.

    Raises:
        ApiError: context_length_exceeded, with both numbers; nothing is ever cut.
    """
    left = n_ctx - n_prompt
    limit = f"This model's maximum context length is {n_ctx} tokens."
    if asked is None and left >= 1:
        return left if default is None else min(default, left)
    if asked is not None and asked <= left:
        return asked
    if left < 1 or asked is None:
        message = (
            f"{limit} However, your {param} resulted in {n_prompt} tokens. "
            f"Please reduce the length of the {param}."
        )
    else:
        message = (
            f"{limit} However, you requested {n_prompt + asked} tokens ({n_prompt} in the "
            f"{param}, {asked} in the completion). Please reduce the length of the {param} or "
            "completion."
        )
    raise bad_request(message, param, "context_length_exceeded")


def sampling_of(server: Server, body: GenerationBody, grammar: str) -> Sampling:
    """The settings of the first choice; temperature is 1 by default, as OpenAI's.

    Raises:
        ApiError: a biased token that is not the vocabulary's.
    """
    n_vocab = server.model.vocabulary.n_tokens
    bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    for token, _ in bias:
        if token >= n_vocab:
            message = f"{token} is not a token id of this model (0 to {n_vocab - 1})"
            raise bad_request(message, "logit_bias")
    return Sampling(
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_k=max(0, body.top_k or 0),
        # OpenAI takes 0 too; like any tiny value it leaves the likeliest token.
        top_p=1.0 if body.top_p is None else max(1e-6, float(body.top_p)),
        min_p=float(body.min_p or 0.0),
        repeat_penalty=float(body.repeat_penalty or body.repetition_penalty or 1.0),
        presence_penalty=float(body.presence_penalty or 0.0),
        frequency_penalty=float(body.frequency_penalty or 0.0),
        logit_bias=bias,
        seed=(secrets.randbelow(_SEEDS) if body.seed is None else body.seed) % _SEEDS,
        grammar=grammar,
    )


def choices(job: Job, target: Target, n: int) -> list[Job]:
    """The jobs of `n` answers to one prompt; the seed of each is the one before's plus 1."""
    return [
        dataclasses.replace(
            job,
            adapters=target.adapters,
            sampling=dataclasses.replace(job.sampling, seed=(job.sampling.seed + i) % _SEEDS),
        )
        for i in range(n)
    ]


def check_limits(server: Server, body: GenerationBody, n: int) -> None:
    """Refuse what is more than this server answers in one request.

    Raises:
        ApiError: names the field and its limit.
    """
    limits = server.settings.limits
    stops = body.stop or []
    longest = max((len(stop.encode()) for stop in stops), default=0)
    for param, size, most, what in (
        ("n", n, limits.max_n, "answers"),
        ("stop", len(stops), limits.max_stop, "strings"),
        ("stop", longest, limits.max_stop_bytes, "bytes in a string"),
        ("logit_bias", len(body.logit_bias or {}), limits.max_logit_bias, "tokens"),
        ("grammar", len((body.grammar or "").encode()), limits.max_grammar_bytes, "bytes"),
    ):
        if size > most:
            raise bad_request(f"'{param}': {size} {what}, at most {most} are possible", param)


def grammar_of(
    server: Server, body: GenerationBody, wanted: ResponseFormat | None, param: str
) -> str:
    """The GBNF that the answer has to follow, "" for none.

    Args:
        param: where the request has its schema.

    Raises:
        ApiError: a grammar that does not parse, or a schema that cannot be enforced whole.
    """
    if wanted is not None and wanted.type != "text":
        schema = wanted.wanted_schema()
        return JSON_OBJECT_GBNF if schema is None else _schema_grammar(server, schema, param)
    if not body.grammar:
        return ""
    try:
        check_grammar(body.grammar)
    except InvalidGrammar as error:
        raise bad_request(str(error), "grammar", "invalid_grammar") from error
    return body.grammar


def _schema_grammar(server: Server, schema: dict[str, Any], param: str) -> str:
    try:
        grammar = json_schema_to_gbnf(schema, max_bytes=server.settings.limits.max_schema_bytes)
    except SchemaError as error:
        raise bad_request(str(error), param, "invalid_json_schema") from error
    check_grammar(grammar)  # here, in a worker thread, rather than where it is submitted
    return grammar
