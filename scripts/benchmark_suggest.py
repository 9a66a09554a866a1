"""Suggestions as retrieval: how often the nearest adapter is of the right source or category.

    python scripts/benchmark_suggest.py CATALOGUE LAB_BANK RESULTS.jsonl [--seeds 2]

CATALOGUE is a folder as models/catalogue; LAB_BANK holds `<task>/train.jsonl` and `task.json` with
source and category. Queries are 16 and 64 training lines of each task, 64 without the instruction,
and each row of the catalogue with its own row hidden. Weights of fields are tuned on the queries of
half of the sources (by a hash of the source's name) and every number of RESULTS is of the other
half. One line of JSON for each way to compare is appended to RESULTS; those that are there already
are skipped, so an interrupted run goes on where it stopped. `make bench-report` writes the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_report import read_results
from result_lines import append_line
from suggest_benchmark.arms import ARMS, Arm, Matrix, Scores, matrices
from suggest_benchmark.measuring import cells, combined, judged, quality, tuned
from suggest_benchmark.queries import Query, lab_queries, row_queries

from edgelora.cli import console
from edgelora.suggest.catalogue import FIELDS, Catalogue, read_catalogue

Matrices = Mapping[str, tuple[Matrix, Matrix]]


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("lab", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", type=int, default=2, help="draws of the lab's lines")
    arguments = parser.parse_args()
    done = {row["model"] for row in read_results(arguments.results)}
    missing = [arm for arm in ARMS if arm.name not in done]
    if not missing:
        return
    catalogue = read_catalogue(arguments.catalogue)
    queries = [*lab_queries(arguments.lab, range(arguments.seeds)), *row_queries(catalogue)]
    counts = matrices(queries, catalogue)
    for arm in missing:
        print(arm.name, file=sys.stderr, flush=True)
        row = measure(arm, queries, catalogue, counts) | {"seeds": arguments.seeds}
        append_line(arguments.results, row)


def measure(
    arm: Arm, queries: Sequence[Query], catalogue: Catalogue, counts: Matrices
) -> dict[str, Any]:
    """One arm: its weights from one half of the queries, its numbers from the other."""
    first = [i for i, query in enumerate(queries) if query.for_tuning]
    second = [i for i, query in enumerate(queries) if not query.for_tuning]
    weights, tuning_mrr = None, None
    if arm.by_field:
        weights, tuning_mrr = tuned(*_half(arm, first, queries, catalogue, counts))
    by_field, reported, targets = _half(arm, second, queries, catalogue, counts)
    scores = combined(by_field, weights) if weights else by_field["pooled"]
    found = cells(scores, reported, targets)
    return {
        "part": "suggest",
        "model": arm.name,
        "weights": weights,
        "tuning_mrr": tuning_mrr,
        "mrr": quality(found),
        "cells": found,
    }


def _half(
    arm: Arm,
    chosen: Sequence[int],
    queries: Sequence[Query],
    catalogue: Catalogue,
    counts: Matrices,
) -> tuple[dict[str, Scores], list[Query], Any]:
    names = FIELDS if arm.by_field else ("pooled",)
    of_half = [queries[i] for i in chosen]
    compare = arm.compare
    with console.progress(arm.name, total=len(chosen) * len(names)) as advance:
        if isinstance(compare, partial) and "name" in compare.keywords:
            compare = partial(compare, advance=advance)
        scores = {
            name: compare(counts[name][0][np.array(chosen)], counts[name][1]) for name in names
        }
    return scores, of_half, judged(of_half, catalogue.counted)


if __name__ == "__main__":
    main()
