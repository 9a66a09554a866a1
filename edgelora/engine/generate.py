"""One conversation at a time: sampled text, streamed token by token."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.context import Context
from edgelora.engine.sampling import Sampling, open_sampler
from edgelora.errors import EngineError

__all__ = ["Sampling", "stream"]


def stream(
    context: Context, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling | None = None
) -> Iterator[str]:
    """Yield the answer to `prompt` as it is made; a character is never split.

    There is one piece for each token ("" while a character is unfinished) and a last one for what
    was left unfinished, so an answer that was cut has `max_tokens` + 1 pieces. What `prompt` shares
    with the previous call on this context is not computed again.

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
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sampler = open_sampler(context.model, sampling or Sampling(), prompt)
    with contextlib.closing(sampler):
        logits = _read(context, prompt)
        for _ in range(max_tokens):
            token = sampler.sample(context, -1, logits[-1])
            if sampler.ended or context.model.vocabulary.is_end(token):
                break
            yield decoder.decode(context.model.vocabulary.decode([token]))
            logits = _compute(context, context.kept, [token])
    yield decoder.decode(b"", final=True)


def _read(context: Context, prompt: Sequence[int]) -> NDArray[np.float32]:
    """Compute what is new in the prompt; the logits after its last token."""
    kept, n = context.kept, 0
    while n < min(len(kept), len(prompt) - 1) and kept[n] == prompt[n]:
        n += 1
    if n:
        context.truncate(0, n)
    else:
        context.clear()
    known, logits = list(prompt[:n]), np.empty((0, 0), np.float32)
    for start in range(n, len(prompt), context.n_batch):
        ids = prompt[start : start + context.n_batch]
        logits = _compute(context, known, ids, output=start + len(ids) == len(prompt))
        known = context.kept
    return logits


def _compute(
    context: Context, known: list[int], ids: Sequence[int], *, output: bool = True
) -> NDArray[np.float32]:
    """Add `ids` to sequence 0, which holds `known`; logits of the last one if it is an output."""
    context.batch.clear()
    context.batch.extend(ids[:-1], len(known), 0, False)
    context.batch.add(ids[-1], len(known) + len(ids) - 1, 0, output)
    logits = context.compute()
    known.extend(ids)
    context.kept = known
    return logits
