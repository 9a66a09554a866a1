"""`--refine auto`: gradients where the base, the budget and the time allow them, else losses."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace

from edgelora.build.gradients import (
    Opened,
    count_first_pass,
    open_decoder_and_adapters,
    threads,
    timed_step,
)
from edgelora.build.pace import fit_comparisons, measure_speed, seconds_left
from edgelora.build.records import AUTO
from edgelora.build.samples import learned_of
from edgelora.build.work import Parts, Work, count_reserved_tokens
from edgelora.engine.score import TokenisedExample
from edgelora.errors import UnsupportedFile
from edgelora.gradient.decoder import PassOptions

_BLOCKS_TIMED = 4
# Examples that gradients learn from where one pass over all would take too long. On the tiny bed
# four with gradients recover more than sixteen without (docs/results.md).
_FEWER = (32, 16, 8)


def settle_refinement(work: Work, parts: Parts | None) -> Opened | None:
    """Put what `refine="auto"` comes to in `work.options`; any other stays.

    One pass of gradients tells more than as many forward passes (docs/gradient.md), so they are
    taken unless another operator than auto is asked for, nothing measures losses, or one pass over
    a few of the examples would not fit the budget or the time. What a person may not expect is
    told.

    Args:
        parts: None without completions.

    Returns:
        What was opened on the way.
    """
    options = work.options
    if options.refine != AUTO:
        return None
    work.options = replace(options, refine="gradient")
    if options.objective:
        return None
    if parts is None or options.operator != "auto":
        work.options = replace(options, refine="forward")
        return None
    if options.combine == "linear":
        _fall_back(work, "linear averages factors: no sum that gradients are computed for")
        return None
    try:
        opened = open_decoder_and_adapters(work, "")
    except UnsupportedFile as error:
        _fall_back(work, error.what)
        return None
    shortage = _find_shortage(work, parts, opened)
    if not shortage or _fits_fewer(work, parts, opened, shortage):
        return opened
    _fall_back(work, shortage)
    return None


def _fits_fewer(work: Work, parts: Parts, opened: Opened, shortage: str) -> bool:
    """Whether gradients that learn from fewer examples do not lack anything."""
    n_examples = len(learned_of(work, parts.support))
    for n_fewer in _FEWER:
        if n_fewer >= n_examples:
            continue
        work.n_learned = n_fewer
        if not _find_shortage(work, parts, opened):
            work.warn(f"{shortage}: gradients learn from {n_fewer} of {n_examples} examples")
            return True
    work.n_learned = None
    return False


def _fall_back(work: Work, why: str) -> None:
    """Back to forward passes, and say why."""
    work.options = replace(work.options, refine="forward")
    work.warn(f"{why}: coefficients come from the losses of forward passes")


def _find_shortage(work: Work, parts: Parts, opened: Opened) -> str:
    """What a descent of one pass lacks, in words; "" if nothing."""
    fitted = fit_comparisons(work, parts)
    n_gradient, n_forward = count_first_pass(work, opened, fitted)
    n_forward += count_reserved_tokens(work, fitted)
    n_tokens = n_gradient + n_forward
    if n_tokens > work.budget.left:
        return (
            f"one pass of gradients and its comparisons take {n_tokens:,} tokens, and "
            f"{work.budget.left:,} are left"
        )
    limit_s = work.options.limit_s
    if not math.isfinite(limit_s):
        return ""
    seconds = n_forward / measure_speed(work, parts.support)
    allowed_s = seconds_left(work, parts)
    if seconds <= allowed_s:
        seconds += n_gradient / measure_gradients(work, opened, parts.support)
    if seconds <= allowed_s:
        return ""
    return (
        f"one pass of gradients and its comparisons would take about {seconds / 60:.0f} min of "
        f"{limit_s / 60:.0f} (--budget allows more)"
    )


def measure_gradients(work: Work, opened: Opened, texts: Sequence[TokenisedExample]) -> float:
    """Forward-equivalent tokens a second of one step, from a few blocks of its forward.

    Adapters cost some time more: what is planned is measured with them, on a whole step. It is
    measured once in a build.
    """
    if math.isnan(work.gradients_per_s):
        work.gradients_per_s = _time_blocks(work, opened, texts)
    return work.gradients_per_s


def _time_blocks(work: Work, opened: Opened, texts: Sequence[TokenisedExample]) -> float:
    decoder, times = opened.decoder, []
    step = timed_step(texts)
    n_rows = decoder.count_rows(step, PassOptions())
    work.spend(n_rows, "a test of speed", at_once=True)

    def stop(_n_blocks: int) -> None:
        times.append(time.perf_counter())
        if len(times) > _BLOCKS_TIMED:
            raise _Enough

    with threads(work), contextlib.suppress(_Enough):
        decoder.losses(step, {}, progress=stop)
    if len(times) < 2:
        return math.inf  # a single block takes no time
    each = (times[-1] - times[0]) / (len(times) - 1)
    return n_rows / (each * work.model.base.n_layer)


class _Enough(Exception):
    """Enough blocks were timed."""
