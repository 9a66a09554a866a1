"""Forward passes of adapters applied side by side, without a file; bad ones are cut short."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.build.trials import Budget
from edgelora.engine.context import Context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import TokenisedExample, count_tokens, score
from edgelora.operators.arbiter import paired_difference
from edgelora.operators.searches import Spent, is_hopeless

Array = NDArray[np.float64]
_SHARE_FIRST, _LEAST_FIRST = 4, 4


class Passes:
    """Losses of weighted sums of a few files, on the examples that a search learns from.

    Attributes:
        n_tokens: (n,) completion tokens of each example.
    """

    def __init__(
        self,
        context: Context,
        files: Sequence[Path],
        examples: Sequence[TokenisedExample],
        budget: Budget,
    ) -> None:
        self._context, self._files, self._budget = context, files, budget
        self._examples = examples
        self._best: Array | None = None
        self.n_tokens = np.array([len(e.completion) for e in examples], np.float64)

    def nll(self, weights: Array, first: int = 0, end: int | None = None) -> Array:
        """Summed losses of a part of the examples, (end - first,) nats.

        Args:
            weights: (k,) of the files.

        Raises:
            Spent: the budget has not that many tokens.
        """
        part = self._examples[first:end]
        if not self._budget.take(count_tokens(part)):
            raise Spent
        pairs = zip(self._files, weights, strict=True)
        self._context.apply([WeightedAdapter(file, float(w)) for file, w in pairs])
        return np.array([s.nll for s in score(self._context, part)])

    def loss(self, weights: Array) -> float:
        """Mean nats a token; of what is hopeless after the first examples, an estimate from them.

        Raises:
            Spent: as `nll`.
        """
        n = len(self._examples)
        n_first = max(_LEAST_FIRST, n // _SHARE_FIRST)
        if self._best is None or n < 2 * n_first:
            nll = self.nll(weights)
        else:
            nll = self.nll(weights, 0, n_first)
            best, counts = self._best[:n_first], self.n_tokens[:n_first]
            if not np.isfinite(nll).all():
                return float("inf")
            if is_hopeless(nll, best, counts):
                return self._mean(self._best) + paired_difference(nll, best, counts)[0]
            nll = np.concatenate([nll, self.nll(weights, n_first)])
        if not np.isfinite(nll).all():
            return float("inf")
        if self._best is None or nll.sum() < self._best.sum():
            self._best = nll
        return self._mean(nll)

    def _mean(self, nll: Array) -> float:
        return float(nll.sum() / self.n_tokens.sum())
