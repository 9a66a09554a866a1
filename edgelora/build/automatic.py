"""`--refine auto`: gradients where the base, the budget and the time allow them, else losses."""

from __future__ import annotations

import math
from dataclasses import replace

from edgelora.build.gradients import Opened, count_first_pass, open_decoder_and_adapters
from edgelora.build.pace import fit_comparisons, measure_speed, seconds_of_passes
from edgelora.build.records import AUTO
from edgelora.build.work import Parts, Work, count_reserved_tokens
from edgelora.errors import UnsupportedFile

# Of llama.cpp's tokens a second, what forward-equivalents of gradients reach, and 7B at least:
# see docs/gradient.md.
_SPEED_OF_GRADIENTS = 0.6


def settle_refinement(work: Work, parts: Parts | None) -> Opened | None:
    """Put what `refine="auto"` comes to in `work.options`; any other stays.

    One pass of gradients tells more than as many forward passes (docs/gradient.md), so they are
    taken unless another operator than auto is asked for, nothing measures losses, or one pass would
    not fit the budget or the time. What a person may not expect is told.

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
    if shortage := _find_shortage(work, parts, opened):
        _fall_back(work, shortage)
        return None
    return opened


def _fall_back(work: Work, why: str) -> None:
    """Back to forward passes, and say why."""
    work.options = replace(work.options, refine="forward")
    work.warn(f"{why}: coefficients come from the losses of forward passes")


def _find_shortage(work: Work, parts: Parts, opened: Opened) -> str:
    """What a descent of one pass lacks, in words; "" if nothing."""
    n_tokens = count_first_pass(work, opened, parts)
    n_tokens += count_reserved_tokens(work, fit_comparisons(work, parts))
    if n_tokens > work.budget.left:
        return (
            f"one pass of gradients and its comparisons take {n_tokens:,} tokens, and "
            f"{work.budget.left:,} are left"
        )
    limit_s = work.options.limit_s
    if not math.isfinite(limit_s):
        return ""
    speed = _SPEED_OF_GRADIENTS * measure_speed(work, parts.support)
    allowed_s = seconds_of_passes(work, parts)
    if n_tokens <= speed * allowed_s:
        return ""
    return (
        f"one pass of gradients would take about {n_tokens / speed / 60:.0f} min of "
        f"{limit_s / 60:.0f} (--budget allows more)"
    )
