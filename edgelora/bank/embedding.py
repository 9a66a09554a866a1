"""Signatures made by the base itself, which is opened when the first one is needed."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.bank.adding import Embed
from edgelora.bank.store import Bank
from edgelora.datasets.records import Dataset
from edgelora.errors import BankError, InvalidFile
from edgelora.signature import Signature

DEFAULT_LIMIT_S = 180.0
_STEPS = (48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)

if TYPE_CHECKING:
    from edgelora.adapters.base import Base
    from edgelora.embedding_cache import EmbeddingCache
    from edgelora.engine.context import Context
    from edgelora.engine.model import Model, ModelOptions


@contextlib.contextmanager
def open_embedder(
    base: Path,
    *,
    n_layers: int = 0,
    n_threads: int = 0,
    low_ram: bool | None = False,
    seed: int = 0,
    n_embedded: int = 0,
    limit_s: float = math.inf,
    warn: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda n_texts: None,
) -> Iterator[Embed]:
    """Yield a function from a dataset, or a description, to its signature by this base.

    Args:
        n_layers: see `layers_for` and engine.embed.embed.
        low_ram: see engine.model.ModelOptions.
        n_embedded: examples of a dataset that are embedded at most; 0 means as many as usual, or
            as this machine embeds in `limit_s`, which a short test tells.

    Adding adapters that all have a signature never loads the base; `warn` is told what the engine
    has to say of how it was opened, `progress` how many texts more have been embedded.

    Raises (when the function is called):
        EngineError: llama.cpp refused the base.
        DatasetError: there is nothing to embed.
    """
    from edgelora.engine.embed import measure_speed
    from edgelora.engine.model import ModelOptions
    from edgelora.summarise import DEFAULT_N_EMBEDDED, summarise_examples, summarise_text

    with contextlib.ExitStack() as stack:

        @functools.cache
        def engine() -> tuple[Context, EmbeddingCache]:
            options = ModelOptions(n_threads=n_threads, low_ram=low_ram)
            return stack.enter_context(_open_engine(base, options, warn))

        @functools.cache
        def speed() -> float:
            return measure_speed(engine()[0], n_layers)

        def embed(what: Dataset | str) -> Signature:
            context, cache = engine()
            if isinstance(what, str):
                return summarise_text(context, what, cache=cache, n_layers=n_layers, seed=seed)
            n = n_embedded or DEFAULT_N_EMBEDDED
            if not n_embedded and math.isfinite(limit_s):
                n = _count_in_time(context.model, what, speed(), limit_s, seed, warn)
            return summarise_examples(
                context, what.examples, cache=cache, n_embedded=n, n_layers=n_layers, seed=seed,
                progress=progress,
            )  # fmt: skip

        yield embed


@contextlib.contextmanager
def _open_engine(
    base: Path, options: ModelOptions, warn: Callable[[str], None]
) -> Iterator[tuple[Context, EmbeddingCache]]:
    from edgelora.embedding_cache import open_cache
    from edgelora.engine.context import open_context
    from edgelora.engine.embed import WINDOW
    from edgelora.engine.model import open_model

    with (
        open_model(base, options) as model,
        open_context(model, n_ctx=WINDOW, hidden=True) as context,
        open_cache() as cache,
    ):
        for warning in model.warnings:
            warn(warning)
        yield context, cache


def _count_in_time(
    model: Model,
    data: Dataset,
    tokens_per_s: float,
    limit_s: float,
    seed: int,
    warn: Callable[[str], None],
) -> int:
    """How many examples of a dataset are embedded within a time, in coarse steps."""
    from edgelora.summarise import DEFAULT_N_EMBEDDED, affordable_examples

    n_wanted = min(DEFAULT_N_EMBEDDED, len(data.examples))
    n, _ = affordable_examples(model, data.examples, int(limit_s * tokens_per_s), seed=seed)
    if n == n_wanted:
        return n
    # So that a little noise in the speed seldom changes a signature.
    n = next(step for step in _STEPS if step <= n)
    warn(
        f"{data.path}: {n} of {n_wanted} examples are embedded, for at {tokens_per_s:,.0f} "
        f"tokens/s more would take over {limit_s / 60:.0f} min; --embed {n_wanted} takes them all"
    )
    return n


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
