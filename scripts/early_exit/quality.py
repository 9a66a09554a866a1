"""What a shortlist by embeddings finds, by the layers that the embeddings come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from suggest_benchmark.measuring import ranks

from edgelora.cli import console
from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Example
from edgelora.embedding_cache import EmbeddingCache, open_cache
from edgelora.engine.context import Context, open_context
from edgelora.engine.model import Model
from edgelora.operators.distances import measure
from edgelora.operators.mixture import mixture
from edgelora.signature import Signature
from edgelora.summarise import sample_examples, summarise_examples

N_TOP = 5
# What is looked for. The task's own adapter is hidden from all but the first, and those of its
# source from the last.
OWN, SOURCE, CATEGORY, FOREIGN = "own", "source", "category", "category, source hidden"
TARGETS = (OWN, SOURCE, CATEGORY, FOREIGN)
WAYS = ("bures", "mixture")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """One task: its facts, lines for the bank's signature, and other lines for queries."""

    name: str
    source: frozenset[str]
    category: frozenset[str]
    known: tuple[Example, ...]
    asked: tuple[tuple[Example, ...], ...]


def read_tasks(folder: Path, n_known: int, n_asked: int, n_draws: int) -> list[Task]:
    """Lines of train.jsonl are known, lines of test.jsonl ask; no line asks twice."""
    tasks = []
    for path in sorted(folder.iterdir()):
        facts = json.loads((path / "task.json").read_text(encoding="utf-8"))
        train = read_dataset(path / "train.jsonl").examples
        test = sample_examples(read_dataset(path / "test.jsonl").examples, n_asked * n_draws)
        asked = tuple(test[i::n_draws] for i in range(n_draws))
        source, category = frozenset(facts["source"]), frozenset(facts["category"])
        known = sample_examples(train, n_known)
        tasks.append(Task(path.name, source, category, known, asked))
    return tasks


def measure_quality(model: Model, tasks: Sequence[Task], depths: Sequence[int]) -> dict[str, Any]:
    """For each depth (0 is all layers) what is found, and how it agrees with all layers."""
    orders: dict[int, dict[str, list[Array]]] = {}
    found = []
    with open_cache() as cache, open_context(model, hidden=True) as context:
        for depth in (0, *(d for d in depths if d)):
            known, asked = _embed(context, cache, tasks, depth)
            scores = {way: list(_scores(way, known, asked)) for way in WAYS}
            orders[depth] = {way: [own for _, own in scores[way]] for way in WAYS}
            found.append({"n_layers": depth or model.base.n_layer, **_judge(tasks, scores)})
            for way in WAYS:
                found[-1][way]["agreement"] = _agreement(orders[0][way], orders[depth][way])
    n = model.base.n_layer
    found.sort(key=lambda row: row["n_layers"])
    return {
        "n_layer": n, "n_tasks": len(tasks), "n_asked": len(tasks) * len(tasks[0].asked),
        "n_known": len(tasks[0].known), "lines": len(tasks[0].asked[0]), "depths": found,
    }  # fmt: skip


def _embed(
    context: Context, cache: EmbeddingCache, tasks: Sequence[Task], depth: int
) -> tuple[list[Signature], list[list[Signature]]]:
    """Signatures of the bank, and of the queries of each task."""
    n_texts = 2 * sum(len(t.known) + sum(map(len, t.asked)) for t in tasks)
    what = f"embedding after {depth or 'all'} layers"
    with console.progress(what, n_texts) as advance:

        def sign(examples: Sequence[Example]) -> Signature:
            return summarise_examples(
                context, examples, cache=cache, n_layers=depth, progress=advance
            )

        return [sign(t.known) for t in tasks], [[sign(part) for part in t.asked] for t in tasks]


def _scores(
    way: str, known: Sequence[Signature], asked: Sequence[Sequence[Signature]]
) -> Iterator[tuple[Array, Array]]:
    """For each query how near each task of the bank is: all of them, and its own left out."""
    for i, queries in enumerate(asked):
        others = [signature for j, signature in enumerate(known) if j != i]
        for query in queries:
            yield _near(way, query, known), np.insert(_near(way, query, others), i, -np.inf)


def _near(way: str, query: Signature, known: Sequence[Signature]) -> Array:
    return mixture(query, known) if way == "mixture" else -measure(way, query, known)


def _judge(
    tasks: Sequence[Task], scores: Mapping[str, Sequence[tuple[Array, Array]]]
) -> dict[str, Any]:
    """Mean reciprocal rank and the share in the first 1 and 5, by way and target."""
    rows = [i for i, task in enumerate(tasks) for _ in task.asked]
    own = np.array([[i == j for j in range(len(tasks))] for i in rows])
    source = np.array([[bool(tasks[i].source & t.source) for t in tasks] for i in rows])
    category = np.array([[bool(tasks[i].category & t.category) for t in tasks] for i in rows])
    targets = {
        OWN: (own, np.zeros_like(own)),
        SOURCE: (source & ~own, own),
        CATEGORY: (category & ~own, own),
        FOREIGN: (category & ~source & ~own, source | own),
    }
    judged: dict[str, Any] = {}
    for way, pairs in scores.items():
        cells = {}
        for target, (right, hidden) in targets.items():
            near = np.array([whole if target == OWN else left for whole, left in pairs])
            places = ranks(near, right, hidden)
            places = places[~np.isnan(places)]
            cells[target] = {
                "n": len(places), "mrr": float((1 / places).mean()),
                **{f"top{n}": float((places <= n).mean()) for n in (1, N_TOP)},
            }  # fmt: skip
        quality = float(np.mean([cells[target]["mrr"] for target in TARGETS[1:]]))
        judged[way] = {"cells": cells, "quality": quality}
    return judged


def _agreement(whole: Sequence[Array], early: Sequence[Array]) -> float:
    """The mean share of the first five that both have, the task's own adapter left out."""

    def top(near: Array) -> set[int]:
        return {int(i) for i in np.argsort(-near, kind="stable")[:N_TOP]}

    shares = [len(top(a) & top(b)) / len(top(a)) for a, b in zip(whole, early, strict=True)]
    return float(np.mean(shares))
