"""One conversation at a time: sampled text, streamed token by token."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp

from edgelora.engine.context import Context, Row
from edgelora.errors import EngineError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0


def stream(
    context: Context, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling | None = None
) -> Iterator[str]:
    """Yield the answer to `prompt` as it is made; a character is never split.

    There is one piece for each token ("" while a character is unfinished) and a last one for what
    was left unfinished, so an answer that was cut has `max_tokens` + 1 pieces.

    Raises:
        EngineError: the prompt and `max_tokens` do not fit the context, or it is empty.
    """
    if not prompt:
        raise EngineError("an empty prompt has no answer")
    if len(prompt) + max_tokens > context.n_ctx:
        raise EngineError(
            f"a prompt of {len(prompt)} tokens and an answer of {max_tokens} do not fit "
            f"a context of {context.n_ctx}",
            hint="Start a new conversation, or ask for fewer tokens.",
        )
    context.clear()
    for start in range(0, len(prompt), context.n_batch):
        ids = prompt[start : start + context.n_batch]
        context.decode(
            [Row(t, start + i, 0, output=start + i == len(prompt) - 1) for i, t in enumerate(ids)]
        )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with _sampler(sampling or Sampling()) as sampler:
        for position in range(len(prompt), len(prompt) + max_tokens):
            token = llama_cpp.llama_sampler_sample(sampler, context.handle, -1)
            if context.model.vocabulary.is_end(token):
                break
            yield decoder.decode(context.model.vocabulary.decode([token]))
            context.decode([Row(token, position, 0, output=True)])
    yield decoder.decode(b"", final=True)


@contextlib.contextmanager
def _sampler(sampling: Sampling) -> Iterator[Any]:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if sampling.temperature <= 0:
        parts = [llama_cpp.llama_sampler_init_greedy()]
    else:
        parts = [
            llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1),
            llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1),
            llama_cpp.llama_sampler_init_temp(sampling.temperature),
            llama_cpp.llama_sampler_init_dist(sampling.seed),
        ]
    for part in parts:
        llama_cpp.llama_sampler_chain_add(chain, part)
    try:
        yield chain
    finally:
        llama_cpp.llama_sampler_free(chain)
