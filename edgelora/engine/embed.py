"""Mean-pooled hidden states of texts, several packed in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.context import Context, Row

WINDOW = 512


def embed(context: Context, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Embed token sequences: the mean of the last norm's output over all their tokens.

    A text longer than `WINDOW` tokens is embedded window by window, each from position 0, and the
    mean runs over all of them, so the result depends on the text only and nothing is cut.

    Args:
        context: opened with `hidden=True`.
        texts: token ids of each text; an empty one gives a zero vector.

    Returns:
        (n, d) float32, n = len(texts).
    """
    sums = np.zeros((len(texts), context.model.n_embd), np.float64)
    counts = np.array([max(1, len(text)) for text in texts])
    window = min(WINDOW, context.n_batch)
    pieces = [
        (owner, text[start : start + window])
        for owner, text in enumerate(texts)
        for start in range(0, len(text), window)
    ]
    for batch in _pack(pieces, context.n_batch, context.n_sequences):
        context.clear()
        rows = [
            Row(token, position, sequence, output=True)
            for sequence, (_, ids) in enumerate(batch)
            for position, token in enumerate(ids)
        ]
        hidden = context.hidden(rows)
        start = 0
        for owner, ids in batch:
            sums[owner] += hidden[start : start + len(ids)].sum(axis=0, dtype=np.float64)
            start += len(ids)
    return np.asarray(sums / counts[:, None], np.float32)


def _pack(
    pieces: Sequence[tuple[int, Sequence[int]]], n_batch: int, n_sequences: int
) -> list[list[tuple[int, Sequence[int]]]]:
    """Group pieces, in order, so that each group fits one batch."""
    batches: list[list[tuple[int, Sequence[int]]]] = [[]]
    used = 0
    for piece in pieces:
        if batches[-1] and (used + len(piece[1]) > n_batch or len(batches[-1]) == n_sequences):
            batches.append([])
            used = 0
        batches[-1].append(piece)
        used += len(piece[1])
    return [batch for batch in batches if batch]
