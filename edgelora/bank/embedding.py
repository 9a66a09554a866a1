"""Signatures made by the base itself, which is opened when the first one is needed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.bank.adding import Embed
from edgelora.bank.store import Bank
from edgelora.datasets.records import Dataset
from edgelora.errors import BankError, InvalidFile
from edgelora.signature import Signature

if TYPE_CHECKING:
    from edgelora.adapters.base import Base
    from edgelora.embedding_cache import EmbeddingCache
    from edgelora.engine.context import Context


@contextlib.contextmanager
def open_embedder(
    base: Path,
    *,
    n_layers: int = 0,
    n_threads: int = 0,
    low_ram: bool | None = False,
    seed: int = 0,
    warn: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda n_texts: None,
) -> Iterator[Embed]:
    """Yield a function from a dataset, or a description, to its signature by this base.

    Args:
        n_layers: see `layers_for` and engine.embed.embed.
        low_ram: see engine.model.ModelOptions.

    Adding adapters that all have a signature never loads the base; `warn` is told what the engine
    has to say of how it was opened, `progress` how many texts more have been embedded.

    Raises (when the function is called):
        EngineError: llama.cpp refused the base.
        DatasetError: there is nothing to embed.
    """
    from edgelora.embedding_cache import open_cache
    from edgelora.engine.context import open_context
    from edgelora.engine.embed import WINDOW
    from edgelora.engine.model import ModelOptions, open_model
    from edgelora.summarise import summarise_examples, summarise_text

    with contextlib.ExitStack() as stack:

        @functools.cache
        def engine() -> tuple[Context, EmbeddingCache]:
            options = ModelOptions(n_threads=n_threads, low_ram=low_ram)
            model = stack.enter_context(open_model(base, options))
            for warning in model.warnings:
                warn(warning)
            context = stack.enter_context(open_context(model, n_ctx=WINDOW, hidden=True))
            return context, stack.enter_context(open_cache())

        def embed(what: Dataset | str) -> Signature:
            context, cache = engine()
            if isinstance(what, str):
                return summarise_text(context, what, cache=cache, n_layers=n_layers, seed=seed)
            return summarise_examples(
                context, what.examples, cache=cache, n_layers=n_layers, seed=seed, progress=progress
            )

        yield embed


def layers_for(bank: Bank, base: Base, wanted: int | None = None) -> int:
    """After how many layers of `base` the data of a bank is embedded; 0 means all.

    As its signatures were: only those of the same layers can be compared. A bank without any takes
    `wanted`, or all.

    Raises:
        BankError: `wanted` is not what the bank's signatures have, or more layers than there are.
    """
    if wanted is not None and not 0 <= wanted < base.n_layer:
        raise BankError(
            f"{base.path}: {wanted} of its {base.n_layer} layers cannot be asked for",
            hint=f"From 1 to {base.n_layer - 1}, or all of them.",
        )
    found = _layers_of_signatures(bank, base)
    if found is None:
        return wanted or 0
    if wanted is not None and wanted != found:
        raise BankError(
            f"{bank.path}: its signatures come from {found or 'all'} layers of the base, "
            f"{wanted or 'all'} were asked for, and the two cannot be compared",
            hint="Leave --layers out, or make another bank.",
        )
    return found


def _layers_of_signatures(bank: Bank, base: Base) -> int | None:
    """Of the first sound one; None if there is none. `bank verify` names damaged ones."""
    for record in bank.listing().records:
        if record.base_id == base.identity.id and record.has_signature:
            with contextlib.suppress(InvalidFile):
                return bank.signature(record.name, record.base_id).n_layers
    return None
