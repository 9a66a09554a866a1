"""The logit-linear surrogate: coefficients by a convex problem on recorded forward passes.

Near the base, the state h(w) before the head is taken as linear in the coefficients,

    h(w) = h_0 + sum_i w_i (h_i - h_0),

h_0 the base's and h_i those of adapter i alone, each measured by one forward pass. Logits are
linear in h, so the loss of the completions is convex in w, and its minimum needs no more passes.
Whether the model agrees is for a real pass to say: the surrogate only proposes.

At any other point v the same holds for steps u with the slopes (h(v + delta e_i) - h(v)) / delta:
solved, checked, shrunk and linearised again, this is the prox-linear method (Lewis and Wright,
arXiv:0812.0423), here without derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
States = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Head(Protocol):
    """The matrix (v, d) that makes logits of states."""

    def tiles(self) -> Iterator[tuple[int, States]]:
        """All rows, some at a time and with the number of the first; valid until the next."""


@dataclass(frozen=True, eq=False)
class WholeHead:
    """One in memory, (v, d)."""

    matrix: States

    def tiles(self) -> Iterator[tuple[int, States]]:
        """One tile."""
        yield 0, self.matrix


def token_losses(hidden: States, targets: NDArray[np.int64], head: Head) -> NDArray[np.float64]:
    """-log softmax(head @ h)[target] of each token, (t,) float64, in nats.

    Args:
        hidden: (t, d).  targets: (t,).
    """
    sums = _Sums.of(targets)
    for first, tile in head.tiles():
        sums.add(hidden @ tile.T, first)
    return sums.losses()


def fit_step(
    at: States,
    slopes: States,
    targets: NDArray[np.int64],
    head: Head,
    *,
    start: Array,
    penalty: float,
    seen: Mask | None = None,
    max_steps: int = 30,
) -> Array:
    """A step u (k,) from a point: least loss of `at + u . slopes`, plus penalty * ||u - start||^2.

    L-BFGS (scipy) from `start`. With the states of the base, and the differences of each adapter's
    alone as slopes, the step is the coefficients; they may be negative and need not sum to one.

    Args:
        at: (t, d) states at the point.  slopes: (k, t, d) of the states along each coefficient.
        targets: (t,) completion tokens.
        start: (k,) where the step is pulled to.
        penalty: above 0; with few tokens it is what keeps k coefficients in bounds.
        seen: the tokens that count; None for all.
    """
    from scipy.optimize import minimize

    seen = np.ones(len(targets), bool) if seen is None else seen

    def objective(u: Array) -> tuple[float, Array]:
        downhill = np.zeros_like(at)
        losses, downhill[seen] = _losses_and_slopes(
            _moved(at, slopes, u)[seen], targets[seen], head
        )
        gradient = np.einsum("ktd,td->k", slopes, downhill, dtype=np.float64) / len(losses)
        away = u - start
        return (
            float(losses.mean() + penalty * (away**2).sum()),
            gradient + 2.0 * penalty * away,
        )

    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": max_steps})
    return np.asarray(found.x, np.float64)


def held_out_losses(
    at: States,
    slopes: States,
    targets: NDArray[np.int64],
    head: Head,
    owners: NDArray[np.int64],
    *,
    start: Array,
    penalties: Sequence[float],
    n_folds: int = 2,
) -> Array:
    """What the surrogate says of each penalty by cross-validation: mean nats a token, (p,).

    It costs no forward pass: the states are there, and each fold's step is fitted to the others'.

    Args:
        owners: (t,) the example that each token belongs to; those of one share a fold.
        n_folds: at least 2, and no more than there are examples.

    Raises:
        ValueError: fewer examples than folds.
    """
    examples = np.unique(owners)
    if not 2 <= n_folds <= len(examples):
        raise ValueError(f"{n_folds} folds of {len(examples)} examples")
    fold_of = np.searchsorted(examples, owners) % n_folds
    sums = np.zeros(len(penalties))
    for fold in range(n_folds):
        out = fold_of == fold
        for i, penalty in enumerate(penalties):
            u = fit_step(at, slopes, targets, head, start=start, penalty=penalty, seen=~out)
            sums[i] += token_losses(_moved(at, slopes, u)[out], targets[out], head).sum()
    return sums / len(targets)


def shrink(
    loss: Callable[[float], float], bound: float, fractions: Sequence[float] = (1.0, 0.5, 0.25)
) -> tuple[float, float]:
    """The first fraction of a step whose real loss is below `bound`, and that loss.

    Returns:
        (0, bound) if there is none: the surrogate is no guide any more.

    Example:
        >>> shrink(lambda fraction: (fraction - 0.3) ** 2, 0.09)
        (0.5, 0.04000000000000001)
    """
    for fraction in fractions:
        found = loss(fraction)
        if found < bound:
            return fraction, found
    return 0.0, bound


def _moved(at: States, slopes: States, u: Array) -> States:
    return at + np.tensordot(u.astype(np.float32), slopes, axes=1)


def _losses_and_slopes(
    hidden: States, targets: NDArray[np.int64], head: Head
) -> tuple[NDArray[np.float64], States]:
    """The loss of each token, and its gradient with respect to the token's state, (t, d).

    Softmax times the head, less the target's row, in one look at each tile: what was added up is
    scaled down where a later tile has a larger logit (as in arXiv:1805.02867).
    """
    sums, expected = _Sums.of(targets), np.zeros_like(hidden)
    rows = np.empty_like(hidden)
    for first, tile in head.tiles():
        inside = (targets >= first) & (targets < first + len(tile))
        rows[inside] = tile[targets[inside] - first]
        shares, shrunk = sums.add(hidden @ tile.T, first)
        expected *= shrunk[:, None]
        expected += shares @ tile
    expected /= sums.total.astype(np.float32)[:, None]
    return sums.losses(), np.asarray(expected - rows, np.float32)


@dataclass(eq=False)
class _Sums:
    """Of exp(logit - top) over the vocabulary so far, for each token.

    Attributes:
        picked: the logit of the target, (t,) float64.
        top: the largest logit so far, (t,) float32.
        total: (t,) float64.
    """

    targets: NDArray[np.int64]
    picked: NDArray[np.float64]
    top: NDArray[np.float32]
    total: NDArray[np.float64]

    @classmethod
    def of(cls, targets: NDArray[np.int64]) -> _Sums:
        n = len(targets)
        return cls(targets, np.zeros(n), np.full(n, -np.inf, np.float32), np.zeros(n))

    def add(self, logits: States, first: int) -> tuple[States, States]:
        """Add logits (t, n) from row `first` on; they become exp(logit - top).

        Returns:
            These, and what sums so far were multiplied by, (t,).
        """
        inside = (self.targets >= first) & (self.targets < first + logits.shape[1])
        self.picked[inside] = logits[inside, self.targets[inside] - first]
        top = np.maximum(self.top, logits.max(axis=1))
        shrunk = np.exp(self.top - top)
        np.exp(logits - top[:, None], out=logits)
        self.total = self.total * shrunk + logits.sum(axis=1, dtype=np.float64)
        self.top = top
        return logits, shrunk

    def losses(self) -> NDArray[np.float64]:
        """-log softmax at the targets, (t,)."""
        return np.asarray(np.log(self.total) + self.top - self.picked, np.float64)
