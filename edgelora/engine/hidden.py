"""Hidden states before the head, where completions are predicted: losses without the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.context import Context
from edgelora.engine.model import Model
from edgelora.engine.score import (
    TokenisedExample,
    completion_rows,
    grouped,
    refuse_overlong,
    start_shared,
)
from edgelora.gguf_file import open_gguf


@dataclass(frozen=True, eq=False)
class CompletionStates:
    """What predicts the completion tokens of some examples, t tokens in all.

    Attributes:
        hidden: (t, d) float32, output of the last norm.
        targets: (t,) int64, the tokens that are to be predicted.
    """

    hidden: NDArray[np.float32]
    targets: NDArray[np.int64]


def completion_states(context: Context, examples: Sequence[TokenisedExample]) -> CompletionStates:
    """One forward pass, under the adapters applied, that stops before the head.

    Args:
        context: opened with `hidden=True`.

    Raises:
        EngineError: an example is longer than the context.
    """
    refuse_overlong(context, examples, 0)
    n_shared = start_shared(context, examples)
    states = []
    for group in grouped(context, examples, n_shared, 0):
        rows = completion_rows(group, n_shared)
        for start in range(0, len(rows), context.n_batch):
            batch = rows[start : start + context.n_batch]
            if any(row.output for row in batch):
                states.append(context.hidden(batch))
            else:
                context.decode(batch)
        for sequence in range(len(group)):
            context.truncate(sequence, n_shared)
    targets = [token for example in examples for token in example.completion]
    return CompletionStates(np.concatenate(states), np.array(targets, np.int64))


def head_matrix(model: Model) -> NDArray[np.float32]:
    """The head's weights, (n_vocab, d) float32."""
    return np.asarray(open_gguf(model.base.path).array(model.base.head), np.float32)
