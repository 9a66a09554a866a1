"""Datasets to look up: lines of a lab's tasks, and rows of the catalogue itself."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.datasets.read import read_dataset
from edgelora.engine.vocabulary import open_vocabulary
from edgelora.shipped import shipped
from edgelora.suggest.catalogue import FIELDS, FOLDER, N_VOCAB, Catalogue
from edgelora.suggest.fields import count_fields, split_fields
from edgelora.suggest.nearest import VOCABULARY_FILE

N_LINES = (16, 64)
LINES, BARE, ROWS = "{} lines", "64 lines, no instruction", "catalogue rows"
KINDS = (*(LINES.format(n) for n in N_LINES), BARE, ROWS)


@dataclass(frozen=True, eq=False)
class Query:
    """One dataset: what it is of, and the counts of its fields, each (N_VOCAB,)."""

    kind: str
    task: str
    source: tuple[str, ...]
    category: tuple[str, ...]
    n_examples: int
    counts: dict[str, NDArray[np.float64]]

    @property
    def for_tuning(self) -> bool:
        """Half of the sources, by a hash of their names, are tuned on; the others reported."""
        return hashlib.sha256(self.source[0].encode()).digest()[0] % 2 == 0


def lab_queries(lab: Path, seeds: Sequence[int]) -> Iterator[Query]:
    """Training lines of each task, drawn by each seed; 64 of them also without the instruction."""
    with open_vocabulary(shipped(FOLDER) / VOCABULARY_FILE) as vocabulary:
        for folder in sorted(path.parent for path in lab.glob("*/task.json")):
            facts = json.loads((folder / "task.json").read_text(encoding="utf-8"))
            examples = read_dataset(folder / "train.jsonl").examples
            for n, seed in ((n, seed) for n in N_LINES for seed in seeds):
                drawn = random.Random(seed).sample(examples, n)
                query = Query(
                    LINES.format(n),
                    folder.name,
                    tuple(facts["source"]),
                    tuple(facts["category"]),
                    n,
                    dict(count_fields(split_fields(drawn), vocabulary.tokenize)),
                )
                yield query
                if n == N_LINES[-1]:
                    bare = query.counts | {"instruction": np.zeros(N_VOCAB)}
                    yield replace(query, kind=BARE, counts=bare)


def row_queries(catalogue: Catalogue) -> Iterator[Query]:
    """Every counted row as if it were a person's dataset."""
    for i, entry in enumerate(catalogue.counted):
        counts = {}
        for name in FIELDS:
            tokens, values = catalogue.counts[name].row(i)
            counts[name] = np.bincount(tokens, values, minlength=N_VOCAB)
        n = min(400, entry.n_instances or 400)
        yield Query(ROWS, entry.task, entry.source, entry.category, n, counts)
