"""A dataset to its signature: embeddings from the quantised base, cached, and token counts."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.datasets.records import Example, Message
from edgelora.embedding_cache import EmbeddingCache
from edgelora.engine.context import Context
from edgelora.engine.embed import embed
from edgelora.engine.model import Model
from edgelora.engine.tokens import Vocabulary
from edgelora.errors import DatasetError
from edgelora.signature import Signature, summarise

DEFAULT_N_EMBEDDED = 64
_CHUNK = 32
_USUAL_KV_TYPE = "f16"


def embedding_name(n_layers: int = 0) -> str:
    """How texts become embeddings: it travels with signatures that people share.

    Signatures that were made otherwise cannot be compared, so this changes with every change of it.
    """
    how = (
        f"{n_layers} layers, each state by its root mean square"
        if n_layers
        else ("all layers, output norm")
    )
    return f"plain text, windows of 512 tokens, {how}, mean over tokens"


def sample_examples(
    examples: Sequence[Example], n_embedded: int, seed: int = 0
) -> tuple[Example, ...]:
    """At most `n_embedded` examples, drawn by the seed and kept in their order."""
    if len(examples) <= n_embedded:
        return tuple(examples)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), n_embedded))
    return tuple(examples[i] for i in chosen)


def summarise_examples(
    context: Context,
    examples: Sequence[Example],
    *,
    cache: EmbeddingCache,
    n_embedded: int = DEFAULT_N_EMBEDDED,
    n_layers: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n_texts: None,
) -> Signature:
    """The signature of a dataset; token counts are of all examples, embeddings of a sample.

    Prompts and completions are embedded as plain texts, apart, without the chat template.

    Args:
        context: opened with `hidden=True`.
        n_embedded: examples that are embedded at most (drawn by `seed`).
        n_layers: see engine.embed.embed.

    Raises:
        DatasetError: there is no example.
    """
    if not examples:
        raise DatasetError("a signature needs at least one example")
    model = context.model
    sample = sample_examples(examples, n_embedded, seed)
    embedded = functools.partial(
        _embed_texts, context, cache=cache, n_layers=n_layers, progress=progress
    )
    prompts = embedded([prompt_text(e.messages) for e in sample])
    completions = None
    if all(e.completion is not None for e in sample):
        completions = embedded([e.completion or "" for e in sample])
    return summarise(
        prompts,
        completions,
        [token_ids(model, example) for example in examples],
        n_vocab=model.vocabulary.n_tokens,
        base_id=model.base.identity.id,
        n_layers=n_layers,
        seed=seed,
    )


def count_embedded_tokens(model: Model, examples: Sequence[Example]) -> int:
    """Tokens that embedding all of `examples` computes where the cache holds none of them."""
    prompts = {prompt_text(e.messages) for e in examples}
    completions = {e.completion for e in examples if e.completion is not None}
    return sum(
        len(embedded_ids(model.vocabulary, text))
        for part in (prompts, completions)
        for text in part
    )


def affordable_examples(
    model: Model,
    examples: Sequence[Example],
    n_tokens: int,
    *,
    n_wanted: int = DEFAULT_N_EMBEDDED,
    cost_of_token: float = 1.0,
    seed: int = 0,
) -> tuple[int, int]:
    """The largest sample, at least 1 of those there are, that `n_tokens` can embed, and its cost.

    What the cache holds is counted too: else a second run would see more than the first.
    """
    n = cost = 0
    for n in range(min(n_wanted, len(examples)), 0, -1):
        sample = sample_examples(examples, n, seed)
        cost = math.ceil(count_embedded_tokens(model, sample) * cost_of_token)
        if cost <= n_tokens:
            break
    return n, cost


def summarise_text(
    context: Context, description: str, *, cache: EmbeddingCache, n_layers: int = 0, seed: int = 0
) -> Signature:
    """The signature of a task description: one text that stands for the prompts."""
    model = context.model
    embedded = _embed_texts(context, [description], cache=cache, n_layers=n_layers)
    return summarise(
        embedded,
        None,
        [model.vocabulary.tokenize(description)],
        n_vocab=model.vocabulary.n_tokens,
        base_id=model.base.identity.id,
        n_layers=n_layers,
        seed=seed,
    )


def prompt_text(messages: Sequence[Message]) -> str:
    """All turns of a prompt as one plain text."""
    return "\n".join(message.content for message in messages)


def token_ids(model: Model, example: Example) -> list[int]:
    """Token ids of prompt and completion, concatenated (the paper's empirical measure)."""
    return model.vocabulary.tokenize(prompt_text(example.messages)) + model.vocabulary.tokenize(
        example.completion or ""
    )


def embedded_ids(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """Token ids under which a plain text is embedded: no template, BOS where the base adds one."""
    start = [vocabulary.bos] if vocabulary.adds_bos else []
    return tuple(start + vocabulary.tokenize(text))


def embed_cached(
    context: Context,
    texts: Sequence[tuple[int, ...]],
    *,
    cache: EmbeddingCache,
    n_layers: int = 0,
    progress: Callable[[int], None] = lambda n_texts: None,
) -> NDArray[np.float32]:
    """Each distinct text once, from the cache where it is; stored chunk by chunk, so resumable.

    Args:
        context: opened with `hidden=True`.
        texts: token ids of each text.
        n_layers: see engine.embed.embed; vectors of other layers are other vectors.

    Returns:
        (n, d) float32, n = len(texts).
    """
    distinct = list(dict.fromkeys(texts))
    # The file's size tells quantisations of one model apart: their embeddings differ a little, as
    # those from quantised keys and values do.
    model_key = f"{context.model.base.identity.id}-{context.model.base.path.stat().st_size}"
    model_key += f"-{n_layers} layers" if n_layers else ""
    model_key += f"-{context.kv_type}" if context.kv_type != _USUAL_KV_TYPE else ""
    stored = cache.get(model_key, distinct)
    n_embd = context.model.n_embd
    missing = [i for i, vector in enumerate(stored) if vector is None or len(vector) != n_embd]
    for begin in range(0, len(missing), _CHUNK):
        part = missing[begin : begin + _CHUNK]
        fresh = embed(context, [distinct[i] for i in part], n_layers)
        cache.put(model_key, [distinct[i] for i in part], fresh)
        for i, vector in zip(part, fresh, strict=True):
            stored[i] = vector
        progress(len(part))
    by_text = dict(zip(distinct, stored, strict=True))
    return np.array([by_text[text] for text in texts], np.float32)


def _embed_texts(
    context: Context,
    texts: Sequence[str],
    *,
    cache: EmbeddingCache,
    n_layers: int,
    progress: Callable[[int], None] = lambda n_texts: None,
) -> NDArray[np.float32]:
    ids = [embedded_ids(context.model.vocabulary, text) for text in texts]
    return embed_cached(context, ids, cache=cache, n_layers=n_layers, progress=progress)
