"""Signatures made by the base itself, which is opened when the first one is needed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.bank.adding import Embed
from edgelora.datasets.records import Dataset
from edgelora.signature import Signature

if TYPE_CHECKING:
    from edgelora.embedding_cache import EmbeddingCache
    from edgelora.engine.context import Context


@contextlib.contextmanager
def open_embedder(
    base: Path,
    *,
    n_threads: int = 0,
    seed: int = 0,
    warn: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda n_texts: None,
) -> Iterator[Embed]:
    """Yield a function from a dataset, or a description, to its signature by this base.

    Adding adapters that all have a signature never loads the base; `warn` is told what the engine
    has to say of how it was opened, `progress` how many texts more have been embedded.

    Raises (when the function is called):
        EngineError: llama.cpp refused the base.
        DatasetError: there is nothing to embed.
    """
    from edgelora.embedding_cache import open_cache
    from edgelora.engine.context import open_context
    from edgelora.engine.model import ModelOptions, open_model
    from edgelora.summarise import summarise_examples, summarise_text

    with contextlib.ExitStack() as stack:

        @functools.cache
        def engine() -> tuple[Context, EmbeddingCache]:
            model = stack.enter_context(open_model(base, ModelOptions(n_threads=n_threads)))
            for warning in model.warnings:
                warn(warning)
            context = stack.enter_context(open_context(model, hidden=True))
            return context, stack.enter_context(open_cache())

        def embed(what: Dataset | str) -> Signature:
            context, cache = engine()
            if isinstance(what, str):
                return summarise_text(context, what, cache=cache, seed=seed)
            return summarise_examples(
                context, what.examples, cache=cache, seed=seed, progress=progress
            )

        yield embed
