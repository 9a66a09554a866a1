"""The end of a model: the last norm, the logits of the rows that predict, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from edgelora.gradient import layers
from edgelora.gradient.block import Linears
from edgelora.gradient.hyperparameters import OUTPUT_NORM, Hyperparameters
from edgelora.gradient.observers import Observer
from edgelora.gradient.weights import Array

Objective = Callable[[Array, NDArray[np.int64]], tuple[Array, Array]]

# Logits that are alive at a time: 64 MB in float32.
LOGITS = 16 << 20


class Head:
    """logits = norm(x) W^T, W the output matrix or the tied embeddings, a few rows at a time."""

    def __init__(self, linears: Linears, model: Hyperparameters) -> None:
        self._linears = linears
        self._stem = model.head.removesuffix(".weight")
        self._eps = model.eps
        self._step = max(1, LOGITS // model.n_vocab)

    def logits(self, x: Array) -> Array:
        """(n, vocabulary) for the last block's output (n, d)."""
        return self._linears.forward(self._normed(x), self._stem)

    def losses(self, x: Array, targets: NDArray[np.int64], objective: Objective) -> Array:
        """The objective of each row, (n,)."""
        parts = [objective(self.logits(x[rows]), targets[rows])[0] for rows in self._rows(x)]
        return np.concatenate(parts)

    def gradients(
        self,
        x: Array,
        targets: NDArray[np.int64],
        objective: Objective,
        weight: float,
        observe: Observer,
    ) -> tuple[Array, Array]:
        """The objective of each row, (n,), and the gradient of `weight` times its sum, (n, d)."""
        normed = self._normed(x)
        d_normed = np.empty_like(x)
        values = np.empty(len(x), x.dtype)
        for rows in self._rows(x):
            logits = self._linears.forward(normed[rows], self._stem)
            values[rows], d_logits = objective(logits, targets[rows])
            d_logits *= x.dtype.type(weight)
            d_normed[rows] = self._linears.backward(d_logits, normed[rows], self._stem, observe)
        return values, layers.rms_norm_backward(d_normed, x, self._norm, self._eps)

    @property
    def _norm(self) -> Array:
        return self._linears.weights.vector(OUTPUT_NORM)

    def _normed(self, x: Array) -> Array:
        return layers.rms_norm(x, self._norm, self._eps)

    def _rows(self, x: Array) -> Iterator[slice]:
        return (slice(start, start + self._step) for start in range(0, len(x), self._step))
