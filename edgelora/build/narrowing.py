"""A large bank narrowed to what is nearest to the examples, where combining all takes too long."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from edgelora.build.measuring import embed_and_compare
from edgelora.build.pace import estimate_merges, measure_speed
from edgelora.build.proposals import ACTIVATED, NONE, Nearness
from edgelora.build.work import Parts, Work
from edgelora.datasets.split import Split
from edgelora.engine.score import open_for

# Of the time that a build has: for its combinations, and for embedding before the bank is narrowed.
_SHARE_FOR_MERGES = 0.25
_SHARE_FOR_EMBEDDING = 0.1
LEAST_KEPT = 8


def narrow_to_time(work: Work, split: Split, parts: Parts) -> Nearness | None:
    """Leave `work.pool` the adapters nearest to the examples, if time is short for combining all.

    So many stay as a quarter of the time can combine, a power of two, so that a little noise in
    the measured speed often changes nothing.

    Returns:
        The distances of those that stay; None where the pool stays as it is.
    """
    limit_s, pool, k = work.options.limit_s, work.pool, len(work.pool.records)
    if not math.isfinite(limit_s) or work.options.operator in (*ACTIVATED, NONE) or k <= LEAST_KEPT:
        return None
    needed_s = estimate_merges(work, parts)
    if needed_s <= _SHARE_FOR_MERGES * limit_s:
        return None
    takes = (
        f"combinations of all {k} adapters take about {needed_s / 60:.0f} min of "
        f"{limit_s / 60:.0f} (--budget allows more)"
    )
    if not pool.signed:
        work.warn(f"{takes}, and no signature tells which are nearest: --exclude leaves some out")
        return None
    n_kept = 2 ** math.floor(math.log2(k * _SHARE_FOR_MERGES * limit_s / needed_s))
    n_kept = max(LEAST_KEPT, n_kept)
    n_tokens = measure_speed(work, parts.support) * limit_s
    share = _SHARE_FOR_EMBEDDING * min(1.0, n_tokens / max(1, work.budget.left))
    with open_for(work.model, parts.support, hidden=True) as context:
        nearness = embed_and_compare(work, context, split.support, share)
    assert nearness is not None
    kept = np.sort(np.argsort(nearness.distances, kind="stable")[:n_kept]).tolist()
    work.pool, work.merge_s = pool.only(kept), math.nan
    work.warn(f"{takes}: the {n_kept} nearest take part")
    return replace(nearness, distances=nearness.distances[kept])
