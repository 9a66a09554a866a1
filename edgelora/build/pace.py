"""How fast this machine builds, by two short tests, and the budget that a time allows."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgelora.adapters.combine import COMBINATIONS
from edgelora.adapters.gguf_lora import open_loras
from edgelora.adapters.merge import one_blas_thread
from edgelora.adapters.terms import terms_of
from edgelora.build.crossing import N_FOLDS
from edgelora.build.proposals import MIN_SHOWN, N_FITTED, N_SINGLE, count_candidates
from edgelora.build.records import AUTO, Options
from edgelora.build.search import N_LINEARISATIONS, release
from edgelora.build.trials import Budget
from edgelora.build.work import Parts, Work, count_reserved_tokens
from edgelora.engine.context import Row
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import TokenisedExample, count_tokens, open_for
from edgelora.errors import InvalidFile
from edgelora.gradient.descent import DescentOptions

_N_WARM, _N_TIMED, _N_TIMES = 16, 64, 3
_SHARE_OF_PASSES = 0.9
_SHARE_FOR_COMPARISONS = 0.5
# Examples in a part that candidates are compared on: what a short time may cut them to, and what
# is no waste of a budget.
_LEAST_COMPARED, _ENOUGH_COMPARED = 6, 16
_STEP = 500
# Reading and hashing the sources and writing the file take most of what the linear algebra does.
_WITH_FILES = 1.7
_SHARE_THAT_COUNTS = 0.5


def cut_to_time(work: Work, parts: Parts) -> Parts:
    """Give the build the budget that its time allows, where that is less than it has.

    Half of it is for the comparisons: so many of the longest examples leave them, and no more than
    three candidates come so far (see Work). A build that needs more than its time at the very
    least takes that, with a warning.

    Returns:
        The parts with the examples that stay.
    """
    limit_s = work.options.limit_s
    if not math.isfinite(limit_s):
        return parts
    speed = measure_speed(work, parts.support)
    allowed = _rounded(work.budget.n_used + speed * seconds_left(work, parts))
    if allowed >= work.budget.n_tokens:
        return parts
    work.is_cut = True
    fitted = _shortened(
        work, parts, int(_SHARE_FOR_COMPARISONS * allowed), at_least=_LEAST_COMPARED
    )
    least = _count_least_tokens(work, fitted)
    _set_budget(work, max(allowed, least))
    if least > allowed:
        work.warn(
            f"at {speed:,.0f} tokens/s {limit_s / 60:.0f} min allow {allowed:,} tokens, and this "
            f"build takes {least:,} at the very least: about {least / speed / 60:.0f} min"
        )
    return fitted


def fit_comparisons(work: Work, parts: Parts) -> Parts:
    """The parts that leave half of the budget, or of what the time allows, to the search.

    A person with thousands of examples need not have them all compared: the longest leave, as long
    as enough are left. Where they are cross-validated, no more stay than gradients learn from.
    """
    allowed: float = work.budget.left
    if math.isfinite(work.options.limit_s):
        speed = measure_speed(work, parts.support)
        allowed = min(allowed, speed * seconds_left(work, parts))
    n_tokens = int(_SHARE_FOR_COMPARISONS * allowed)
    fitted = _shortened(work, parts, n_tokens, at_least=_ENOUGH_COMPARED)
    most = work.n_learned if parts.is_crossed else None
    while most is not None and len(fitted.support) > most:
        fitted = _without_longest(fitted, most)
    return fitted


def tell_what_left(work: Work, parts: Parts, fitted: Parts) -> None:
    """Warn of examples that comparisons do without."""
    if len(fitted.judged) < len(parts.judged):
        work.warn(
            f"candidates are compared on the {len(fitted.judged)} shortest of "
            f"{len(parts.judged)} examples: more would take over half of the budget or the time "
            "(--budget)"
        )


def estimate_merges(work: Work, parts: Parts) -> float:
    """Seconds that all combinations of a build take; that of one is measured once in a build.

    Of a build that has not settled on a refinement it is the most.
    """
    if math.isnan(work.merge_s):
        work.merge_s = measure_merge(work.pool.paths)
    asked = [work.options]
    if work.options.refine == AUTO:
        asked = [replace(work.options, refine=refine) for refine in ("gradient", "forward")]
    return work.merge_s * max(_count_merges(work, parts, options) for options in asked)


def _count_merges(work: Work, parts: Parts, options: Options) -> float:
    n_candidates = count_candidates(options, bool(work.pool.signed))
    by_gradients = options.refine == "gradient"
    return count_merges(n_candidates, parts.is_crossed, by_gradients=by_gradients)


def cut_embedding_to_time(work: Work, texts: Sequence[TokenisedExample]) -> None:
    """The same for a build that only embeds: what is cut is the number of examples."""
    if not math.isfinite(work.options.limit_s):
        return
    speed = measure_speed(work, texts)
    left_s = max(0.0, work.options.limit_s - work.clock.elapsed_s)
    allowed = _rounded(work.budget.n_used + speed * left_s)
    least = work.budget.n_used + max(text.n_tokens for text in texts)
    if allowed < work.budget.n_tokens:
        work.is_cut = True
        _set_budget(work, max(allowed, least))


def measure_merge(paths: Sequence[Path]) -> float:
    """Seconds that one combination of all these adapters takes, from a tensor of each shape."""
    files = open_loras(paths)
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, planned in {n: p for file in files for n, p in file.plan.items()}.items():
        shapes.setdefault((planned.n_out, planned.n_in), []).append(name)
    even, seconds = np.full(len(files), 1.0 / len(files)), 0.0
    with one_blas_thread():
        for names in shapes.values():
            started = time.perf_counter()
            with contextlib.suppress(InvalidFile):  # told with its name by what uses the adapter
                COMBINATIONS["svd"].make(terms_of(names[0], files, even, 1.0), None)
            seconds += len(names) * (time.perf_counter() - started)
    return _WITH_FILES * seconds


def count_merges(n_candidates: int, is_crossed: bool, *, by_gradients: bool = False) -> float:
    """About how many combinations of the whole pool a build is worth.

    The mean of all is one. Of other candidates, of steps from the best and in the file that is
    written, about half of the pool has a weight that counts; those that are fitted to losses are
    made again for each fold where examples are cross-validated. With gradients it is the whole pool
    for each but the nearest, and for each fold of the descent, at most.
    """
    if by_gradients:
        return max(1, n_candidates - 1) + (DescentOptions().n_folds if is_crossed else 0)
    n_partial = max(0, n_candidates - 1 - N_SINGLE) + N_LINEARISATIONS - 1 + 1
    if is_crossed:
        n_partial += N_FOLDS * min(N_FITTED, n_candidates)
    return 1 + _SHARE_THAT_COUNTS * n_partial


def measure_speed(work: Work, texts: Sequence[TokenisedExample]) -> float:
    """Tokens a second of a batch under an adapter, once the weights have been touched.

    The best of three counts: what else runs on the machine for a moment is no part of its speed.
    It is measured once in a build.
    """
    if math.isnan(work.tokens_per_s):
        work.tokens_per_s = _time_batches(work, texts)
    return work.tokens_per_s


def _time_batches(work: Work, texts: Sequence[TokenisedExample]) -> float:
    ids = [token for text in texts for token in (*text.prompt, *text.completion)]
    adapter = work.pool.paths[0]
    with open_for(work.model, texts) as context:
        n = min(_N_TIMED, context.n_batch, context.n_ctx)
        rows = [Row(ids[i % len(ids)], i, 0, output=i == n - 1) for i in range(n)]
        warm = [replace(row, output=False) for row in rows[:_N_WARM]]
        work.spend(len(warm) + _N_TIMES * n, "a test of speed", at_once=True)
        context.apply([WeightedAdapter(adapter)])
        context.decode(warm)
        elapsed_s = math.inf
        for _ in range(_N_TIMES):
            context.clear()
            started = time.perf_counter()
            context.decode(rows)
            elapsed_s = min(elapsed_s, time.perf_counter() - started)
        release(context, adapter)
    return n / elapsed_s


def seconds_left(work: Work, parts: Parts) -> float:
    """What is left for passes: what merges leave, at least a half, less what has gone by.

    A tenth is for what is neither: fits, files, the last words.
    """
    limit_s = work.options.limit_s
    for_passes = max(limit_s / 2, limit_s - estimate_merges(work, parts))
    return max(0.0, _SHARE_OF_PASSES * for_passes - work.clock.elapsed_s)


def _rounded(n_tokens: float) -> int:
    """Down to whole steps, so that a little noise in the speed often changes nothing."""
    return int(n_tokens // _STEP) * _STEP


def _set_budget(work: Work, n_tokens: int) -> None:
    """Another budget; what was used stays used."""
    used = work.budget.n_used
    work.budget = Budget(n_tokens)
    work.budget.n_used = used


def _shortened(work: Work, parts: Parts, n_tokens: int, *, at_least: int) -> Parts:
    """The parts without their longest examples, until comparing takes `n_tokens`, or few are left.

    Support stays whole where it is not what is compared: the shortest of it are used anyway.
    """
    fitted = parts
    while count_reserved_tokens(work, fitted) > n_tokens:
        longest = max(len(fitted.selection), len(fitted.judged))
        if longest <= at_least:
            break
        fitted = _without_longest(fitted, at_least)
    return fitted


def _without_longest(parts: Parts, at_least: int) -> Parts:
    """The longest examples leave each part that is compared on and has more than that."""
    judged = _cut(parts.judged, at_least)
    if parts.is_crossed:
        return replace(parts, support=judged, judged=judged)
    same = parts.selection is parts.judged
    return replace(
        parts, selection=judged if same else _cut(parts.selection, at_least), judged=judged
    )


def _cut(examples: list[TokenisedExample], at_least: int) -> list[TokenisedExample]:
    """Without a tenth of them, in their order."""
    if len(examples) <= at_least:
        return examples
    n_kept = max(at_least, len(examples) - max(1, len(examples) // 10))
    order = sorted(range(len(examples)), key=lambda i: examples[i].n_tokens)
    return [examples[i] for i in sorted(order[:n_kept])]


def _count_least_tokens(work: Work, parts: Parts) -> int:
    """What embedding one example, measuring one adapter and the comparisons take."""
    shortest = sorted(parts.support, key=lambda example: example.n_tokens)[:MIN_SHOWN]
    measured = 2 * count_tokens(shortest)
    embedded = max(example.n_tokens for example in parts.support)
    return work.budget.n_used + count_reserved_tokens(work, parts) + 2 * measured + embedded
