"""Log-probabilities of tokens under raw logits: of the given ones, and of the likeliest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Of n rows of logits, in nats.

    Attributes:
        chosen: (n,) float64, of each row's given token.
        top_ids: (n, k) int64, the likeliest tokens, best first (the lower id where equal).
        top: (n, k) float64, theirs.
    """

    chosen: NDArray[np.float64]
    top_ids: NDArray[np.int64]
    top: NDArray[np.float64]


def logprobs(
    logits: NDArray[np.float32], tokens: NDArray[np.integer] | list[int], k: int = 0
) -> Logprobs:
    """log softmax of each row at its token, and at its k largest entries.

    Args:
        logits: (n, n_vocab).
        tokens: (n,) one id for each row.
        k: 0 to n_vocab.
    """
    log_z = log_normalisers(logits)
    rows = np.arange(len(logits))
    ids = _largest(logits, k)
    return Logprobs(
        logits[rows, tokens].astype(np.float64) - log_z,
        ids,
        logits[rows[:, None], ids].astype(np.float64) - log_z[:, None],
    )


def log_normalisers(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """log of the sum of exp over each row, (n,) float64; stable by the row's maximum."""
    top = logits.max(axis=1, keepdims=True)
    sums = np.exp(logits - top).sum(axis=1, dtype=np.float64)
    return np.asarray(np.log(sums) + top[:, 0])


def _largest(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    n, n_vocab = logits.shape
    if k <= 0:
        return np.empty((n, 0), np.int64)
    if k == 1:
        return np.asarray(logits.argmax(axis=1)[:, None], np.int64)
    k = min(k, n_vocab)
    ids = np.argpartition(logits, n_vocab - k, axis=1)[:, n_vocab - k :]
    ids.sort(axis=1)
    order = np.argsort(-np.take_along_axis(logits, ids, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(ids, order, axis=1), np.int64)
