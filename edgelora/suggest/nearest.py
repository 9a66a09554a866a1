"""The public adapters whose data is most like a dataset: no base, no bank, no network."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelora.datasets.records import Example
from edgelora.engine.vocabulary import open_vocabulary
from edgelora.errors import DatasetError
from edgelora.shipped import shipped
from edgelora.suggest.catalogue import FIELDS, FOLDER, Catalogue, Entry, read_catalogue
from edgelora.suggest.fields import count_fields, split_fields
from edgelora.suggest.similarity import combine, field_similarity

VOCABULARY_FILE = "mistral-7b-v0.1.vocabulary.gguf"
MAX_COUNTED = 400  # examples of a dataset; the catalogue's counts are of as many


@dataclass(frozen=True)
class Nearest:
    """One adapter of the catalogue.

    Attributes:
        score: how much nearer its data is than the catalogue's mean, in standard deviations.
        similarity: of each field, from 0 (no token in common) to 1 (the same distribution).
    """

    entry: Entry
    score: float
    similarity: Mapping[str, float]


@dataclass(frozen=True)
class Suggestions:
    """The nearest adapters, nearest first, and what they were chosen from.

    Attributes:
        n_ranked: adapters that were compared.
        left_out: those that the catalogue has no counts of.
        n_counted: examples of the dataset whose tokens were counted.
        n_tokens: of each field of these; 0 for a field that the dataset does not have.
    """

    nearest: tuple[Nearest, ...]
    n_ranked: int
    left_out: tuple[Entry, ...]
    n_counted: int
    n_tokens: Mapping[str, int]


def suggest(
    examples: Sequence[Example],
    *,
    top: int = 10,
    seed: int = 0,
    catalogue: Catalogue | None = None,
    vocabulary: Path | None = None,
) -> Suggestions:
    """Compare a dataset's token counts with those of every task of the catalogue.

    Args:
        examples: of more than `MAX_COUNTED`, as many are drawn by `seed`.
        top: how many adapters to return, at least 1.
        catalogue, vocabulary: those that ship with EdgeLoRA if not given.

    Raises:
        DatasetError: no example.
        InvalidFile: a shipped file is damaged.
    """
    if not examples:
        raise DatasetError("a suggestion needs at least one example")
    catalogue = catalogue or read_catalogue()
    drawn = examples
    if len(examples) > MAX_COUNTED:
        drawn = random.Random(seed).sample(examples, MAX_COUNTED)
    with open_vocabulary(vocabulary or shipped(FOLDER) / VOCABULARY_FILE) as opened:
        own = count_fields(split_fields(drawn), opened.tokenize)
    similarity = {name: field_similarity(own[name], catalogue.counts[name]) for name in FIELDS}
    score = combine(similarity)
    order = np.argsort(-score, kind="stable")[:top].tolist()
    return Suggestions(
        nearest=tuple(
            Nearest(
                catalogue.counted[i],
                float(score[i]),
                {name: float(similarity[name][i]) for name in FIELDS},
            )
            for i in order
        ),
        n_ranked=len(catalogue.counted),
        left_out=catalogue.uncounted,
        n_counted=len(drawn),
        n_tokens={name: int(own[name].sum()) for name in FIELDS},
    )
