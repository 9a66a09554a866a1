"""What a build learns before it proposes: distances to the bank, and the loss of each adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from edgelora.build.alone import Measured, measure_adapters
from edgelora.build.pace import estimate_merges, measure_merge
from edgelora.build.proposals import (
    Nearness,
    count_candidates,
    find_nearness,
    needs_losses,
    shortlist,
)
from edgelora.build.records import Plan
from edgelora.build.samples import shown_of
from edgelora.build.search import count_search_passes
from edgelora.build.trials import TRIES_A_CANDIDATE
from edgelora.build.work import UNTOUCHED, Parts, Work
from edgelora.datasets.records import Example
from edgelora.datasets.split import Split
from edgelora.engine.context import Context
from edgelora.engine.score import TokenisedExample, count_tokens, open_for
from edgelora.errors import EngineError
from edgelora.operators.surrogate import token_losses
from edgelora.summarise import DEFAULT_N_EMBEDDED, affordable_examples

_SHARE_FOR_EMBEDDING = 0.4
SHARE_FOR_ADAPTERS = 0.65
_EMBEDDING = "embedding your examples"


def measure_parts(
    work: Work,
    split: Split,
    parts: Parts,
    nearness: Nearness | None = None,
    folder: Path | None = None,
) -> tuple[Nearness | None, Measured, list[TokenisedExample]]:
    """Distances by embeddings, then the loss of each adapter alone on support examples.

    Args:
        nearness: the distances, where they are known.
        folder: see alone.measure_slopes.

    Returns:
        The distances (None without any signature), the losses, and the examples shown.

    Raises:
        EdgeLoRAError: the budget is too small for one adapter.
        EngineError: a loss is not a number.
    """
    pool = work.pool
    with open_for(work.model, parts.support, hidden=True) as context:
        if nearness is None:
            nearness = embed_and_compare(work, context, split.support, _SHARE_FOR_EMBEDDING)
        share = int(SHARE_FOR_ADAPTERS * work.budget.left)
        positions, shown = shortlist(pool, parts.support, nearness, share)
        if not needs_losses(work.options):
            positions = []
        if work.gradient is not None:
            shown = shown_of(work, parts.support)
        work.spend(
            (1 + len(positions)) * count_tokens(shown),
            f"measuring {len(positions)} adapter(s) on {len(shown)} examples",
        )
        measured = measure_adapters(
            context,
            pool,
            positions,
            shown,
            planned=lambda speed: work.listener.plan(
                _plan(work, parts, len(positions), shown, speed)
            ),
            progress=partial(work.listener.progress, "measuring adapters"),
            folder=folder,
        )
    _refuse_nonfinite(work, measured)
    return nearness, measured, shown


def embed_and_compare(
    work: Work, context: Context, examples: Sequence[Example], share: float
) -> Nearness | None:
    """Distances from as many examples as `share` of the tokens left can embed.

    Args:
        context: opened with `hidden=True`.

    Raises:
        EdgeLoRAError: not one example can be embedded.
    """
    if not work.pool.signed:
        return None
    n_wanted = min(len(examples), DEFAULT_N_EMBEDDED)
    n, cost = affordable_examples(
        work.model,
        examples,
        int(share * work.budget.left),
        cost_of_token=_share_of_layers(work),
        seed=work.options.seed,
    )
    work.spend(cost, f"embedding {n} example(s)", at_once=True)
    if n < n_wanted:
        work.warn(f"the budget allows to embed {n} examples of {n_wanted}: distances are coarser")
    nearness = find_nearness(
        context,
        work.pool,
        examples,
        work.options.distance,
        work.options.seed,
        n_embedded=n,
        progress=_counting(work, 2 * n),
    )
    work.listener.progress(_EMBEDDING, 2 * n, 2 * n)
    return nearness


def plan_unmeasured(work: Work, n_examples: int, by: str) -> Plan:
    """The plan of a build that only embeds, or looks at activations; its speed is not known."""
    return Plan(
        n_support=n_examples,
        n_selection=0,
        n_untouched=0,
        n_adapters=len(work.pool.records),
        n_measured=0,
        n_shown=0,
        n_tokens=work.budget.n_used,
        budget_tokens=work.budget.n_tokens,
        tokens_per_s=math.nan,
        gradient=work.gradient,
        by=by,
        is_cut=work.is_cut,
    )


def plan_repeated(work: Work) -> Plan:
    """The plan of a build that an earlier one has measured: it only combines."""
    plan = plan_unmeasured(work, 0, "an earlier build")
    return replace(plan, merge_s=measure_merge(work.pool.paths))


def _share_of_layers(work: Work) -> float:
    """Of the base, that embedding computes: a token that stops early counts as much less."""
    return (work.pool.n_layers or work.model.base.n_layer) / work.model.base.n_layer


def _refuse_nonfinite(work: Work, measured: Measured) -> None:
    """Losses that are not numbers: nothing sound can be made of them."""
    base_loss = token_losses(measured.base.hidden, measured.base.targets, measured.head)
    if not np.isfinite(base_loss).all():
        raise EngineError(
            f"{work.model.base.path}: the base's own loss is not a number",
            hint="Try --low-ram, which avoids llama.cpp's repacked weights; see `edgelora doctor`.",
        )
    names = [work.pool.names[position] for position in measured.positions]
    wild = [n for n, loss in zip(names, measured.losses, strict=True) if not np.isfinite(loss)]
    if wild:
        raise EngineError(
            "adapters under which the loss is not a number",
            problems=wild,
            hint="Leave them out: " + " ".join(f"--exclude {name}" for name in wild),
        )


def _counting(work: Work, n_texts: int) -> Callable[[int], None]:
    """Progress by the number of texts embedded in each step; those in the cache take none."""
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done = min(done + n, n_texts)
        work.listener.progress(_EMBEDDING, done, n_texts)

    advance(0)
    return advance


def _plan(
    work: Work, parts: Parts, n_measured: int, shown: Sequence[TokenisedExample], speed: float
) -> Plan:
    n_candidates = count_candidates(work.options, bool(work.pool.signed))
    n_passes = n_candidates * TRIES_A_CANDIDATE
    n_passes += count_search_passes(work.options, len(work.pool.records))
    return Plan(
        n_support=len(parts.support),
        n_selection=len(parts.selection),
        n_untouched=len(parts.judged) if parts.part == UNTOUCHED else 0,
        n_adapters=len(work.pool.records),
        n_measured=n_measured,
        n_shown=len(shown),
        n_tokens=work.budget.n_used + min(n_passes * count_tokens(shown), work.budget.left),
        n_done=work.n_done,
        budget_tokens=work.budget.n_tokens,
        tokens_per_s=speed,
        gradient=work.gradient,
        merge_s=estimate_merges(work, parts),
        is_cut=work.is_cut,
    )
