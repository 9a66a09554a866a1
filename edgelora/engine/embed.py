"""Mean-pooled hidden states of texts, several packed in one batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.context import Context, Row

WINDOW = 512
EPSILON = np.float32(1e-6)
_N_WARM, _N_TIMED, _N_TIMES = 16, 64, 3


def embed(
    context: Context, texts: Sequence[Sequence[int]], n_layers: int = 0
) -> NDArray[np.float32]:
    """Embed token sequences: the mean of hidden states over all their tokens.

    A text longer than `WINDOW` tokens is embedded window by window, each from position 0, and the
    mean runs over all of them, so the result depends on the text only and nothing is cut.

    Args:
        context: opened with `hidden=True`.
        texts: token ids of each text; an empty one gives a zero vector.
        n_layers: 0 takes the last norm's output; else the states after so many layers, each
            divided by its root mean square, and nothing above them is computed.

    Returns:
        (n, d) float32, n = len(texts).

    Raises:
        EngineError: see Context.hidden.
    """
    steps = embed_in_steps(context, texts, lambda: context.n_batch, n_layers)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return np.asarray(end.value)


def measure_speed(context: Context, n_layers: int = 0) -> float:
    """Tokens a second of embedding one text, the best of three, the weights touched before.

    Args:
        context, n_layers: see `embed`.
    """
    ids = [i % context.model.vocabulary.n_tokens for i in range(min(_N_TIMED, context.n_batch))]
    embed(context, [ids[:_N_WARM]], n_layers)
    elapsed_s = math.inf
    for _ in range(_N_TIMES):
        started = time.perf_counter()
        embed(context, [ids], n_layers)
        elapsed_s = min(elapsed_s, time.perf_counter() - started)
    return len(ids) / elapsed_s


def embed_in_steps(
    context: Context,
    texts: Sequence[Sequence[int]],
    n_tokens: Callable[[], int],
    n_layers: int = 0,
) -> Generator[None, None, NDArray[np.float32]]:
    """As `embed`, but with a pause (a yield) after each batch of at most `n_tokens()` tokens.

    The context must not be used for anything else before the last step.
    """
    sums = np.zeros((len(texts), context.model.n_embd), np.float64)
    counts = np.array([max(1, len(text)) for text in texts])
    window = min(WINDOW, context.n_ctx)
    pieces = [
        (owner, text[start : start + window])
        for owner, text in enumerate(texts)
        for start in range(0, len(text), window)
    ]
    for batch in _pack(pieces, context.n_batch, context.n_sequences):
        context.clear()
        rows = [
            (owner, Row(token, position, sequence, output=not n_layers))
            for sequence, (owner, ids) in enumerate(batch)
            for position, token in enumerate(ids)
        ]
        while rows:
            n = min(max(1, n_tokens()), context.n_batch)
            now, rows = rows[:n], rows[n:]
            hidden = context.hidden([row for _, row in now], n_layers)
            if n_layers:
                hidden = _normalised(hidden)
            owners = np.array([owner for owner, _ in now])
            for owner in np.unique(owners):
                sums[owner] += hidden[owners == owner].sum(axis=0, dtype=np.float64)
            yield
    return np.asarray(sums / counts[:, None], np.float32)


def _normalised(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows over their root mean square: a first token may be a thousand times the others."""
    squares = np.einsum("nd,nd->n", hidden, hidden) / hidden.shape[1]
    return np.asarray(hidden / np.sqrt(squares + EPSILON)[:, None], np.float32)


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
