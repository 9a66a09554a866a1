"""How often a list of the nearest rows holds a right one, and the weights that make it so."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.suggest.catalogue import FIELDS, Entry
from edgelora.suggest.similarity import combine
from suggest_benchmark.queries import Query

TOPS = (1, 5, 32)
# What is looked for; a query's own row is hidden from all but the first.
OWN, SOURCE, CATEGORY, FOREIGN = "own row", "source", "category", "category, source hidden"
TARGETS = (OWN, SOURCE, CATEGORY, FOREIGN)
STEPS = 8  # weights are tuned in eighths
Flags = NDArray[np.bool_]
Scores = NDArray[np.float64]


def judged(queries: Sequence[Query], entries: Sequence[Entry]) -> dict[str, tuple[Flags, Flags]]:
    """For each target, which rows are right and which are hidden; each (n, k)."""
    own = np.array([[q.task == e.task for e in entries] for q in queries])
    source = np.array([[bool({*q.source} & {*e.source}) for e in entries] for q in queries])
    category = np.array([[bool({*q.category} & {*e.category}) for e in entries] for q in queries])
    # A row finds itself whatever is compared, so that is asked of other queries only.
    of_rows = np.array([not q.kind.startswith("catalogue") for q in queries])[:, None]
    return {
        OWN: (own & of_rows, np.zeros_like(own)),
        SOURCE: (source & ~own, own),
        CATEGORY: (category & ~own, own),
        FOREIGN: (category & ~source & ~own, source | own),
    }


def ranks(scores: Scores, right: Flags, hidden: Flags) -> NDArray[np.float64]:
    """The place (from 1) of the nearest right row among those not hidden, (n,).

    Of equal scores the wrong ones come first; NaN where a query has no right row.
    """
    best = np.where(right, scores, -np.inf).max(axis=1)
    before = ~right & ~hidden & (scores >= best[:, None])
    return np.where(right.any(axis=1), 1.0 + before.sum(axis=1), np.nan)


def cells(
    scores: Scores, queries: Sequence[Query], targets: Mapping[str, tuple[Flags, Flags]]
) -> list[dict[str, Any]]:
    """For each kind of query and target: queries with a right row, shares found in each top."""
    found = []
    for target, (right, hidden) in targets.items():
        places = ranks(scores, right, hidden)
        for kind in dict.fromkeys(q.kind for q in queries):
            of_kind = np.array([q.kind == kind for q in queries])
            known = places[of_kind & ~np.isnan(places)]
            if len(known):
                tops = {f"top{n}": float((known <= n).mean()) for n in TOPS}
                mrr = float((1 / known).mean())
                found.append({"kind": kind, "target": target, "n": len(known), **tops, "mrr": mrr})
    return found


def quality(found: Sequence[Mapping[str, Any]]) -> float:
    """What weights are tuned for: the mean over kinds and targets of the mean reciprocal rank.

    A query's own row is not asked for: nearly every arm finds it.
    """
    return float(np.mean([cell["mrr"] for cell in found if cell["target"] != OWN]))


def combined(by_field: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """`edgelora.suggest.similarity.combine`, query by query."""
    n = len(next(iter(by_field.values())))
    return np.array(
        [combine({name: s[i] for name, s in by_field.items()}, weights) for i in range(n)]
    )


def grid() -> list[dict[str, float]]:
    """Weights of instruction, prompt and completion in eighths whose sum is 1."""
    eighths = itertools.product(range(STEPS + 1), repeat=len(FIELDS))
    return [
        {name: part / STEPS for name, part in zip(FIELDS, parts, strict=True)}
        for parts in eighths
        if sum(parts) == STEPS
    ]


def tuned(
    by_field: Mapping[str, Scores],
    queries: Sequence[Query],
    targets: Mapping[str, tuple[Flags, Flags]],
) -> tuple[dict[str, float], float]:
    """The weights of best quality on these queries, and that quality; of equals the first."""
    measured = [
        (quality(cells(combined(by_field, weights), queries, targets)), weights)
        for weights in grid()
    ]
    best = max(measured, key=lambda pair: pair[0])
    return best[1], best[0]
