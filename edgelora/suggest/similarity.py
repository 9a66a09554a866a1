"""How near a dataset is to each task of the catalogue, by token counts, field by field."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgelora.suggest.catalogue import Counts

# Tuned by scripts/benchmark_suggest.py on half of the sources; docs/results.md has the other half.
WEIGHTS: Mapping[str, float] = {"instruction": 0.375, "prompt": 0.5, "completion": 0.125}


def token_weights(counts: Counts, n_vocab: int) -> NDArray[np.float64]:
    """What a token is worth: its inverse document frequency over k tasks, (n_vocab,).

    log((k + 1) / (n + 1)) for a token that n of the tasks have, so 0 for one that all have
    (Spärck Jones, 1972, "A statistical interpretation of term specificity", smoothed).
    """
    k = len(counts.indptr) - 1
    n_tasks = np.bincount(counts.tokens, minlength=n_vocab)
    weights: NDArray[np.float64] = np.log((k + 1) / (n_tasks + 1))
    return weights


def field_similarity(own: NDArray[np.float64], counts: Counts) -> NDArray[np.float64]:
    """The TF-IDF cosine, of (1 + log count) * idf, with each of k tasks: (k,) in [0, 1].

    Salton and Buckley, 1988, "Term-weighting approaches in automatic text retrieval".

    Args:
        own: (n_vocab,), the dataset's counts of one field; without any, all similarities are 0.
        counts: those of k tasks.
    """
    k = len(counts.indptr) - 1
    weights = token_weights(counts, len(own))
    vector = np.zeros(len(own))
    used = own > 0
    vector[used] = (1.0 + np.log(own[used])) * weights[used]
    values = (1.0 + np.log(counts.counts)) * weights[counts.tokens]
    rows = np.repeat(np.arange(k), np.diff(counts.indptr))
    products = np.bincount(rows, values * vector[counts.tokens], minlength=k)
    lengths = np.sqrt(np.bincount(rows, values**2, minlength=k)) * np.linalg.norm(vector)
    cosines: NDArray[np.float64] = np.divide(products, lengths, out=np.zeros(k), where=lengths > 0)
    return np.minimum(cosines, 1.0)


def combine(
    similarities: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float] = WEIGHTS
) -> NDArray[np.float64]:
    """One score of each task: the weighted mean of its standardised similarities, (k,) float64.

    A field counts in standard deviations over the k tasks, so that none outweighs another by the
    range of its cosines alone. A field in which all are alike (the dataset has no such text) is
    left out, and the weights of the others make up for it.
    """
    total, score = 0.0, np.zeros(len(next(iter(similarities.values()))))
    for name, values in similarities.items():
        spread = values.std()
        if spread > 0 and weights[name] > 0:
            score += weights[name] * (values - values.mean()) / spread
            total += weights[name]
    return score / total if total else score
