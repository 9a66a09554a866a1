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

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
States = NDArray[np.float32]


def token_losses(hidden: States, targets: NDArray[np.int64], head: States) -> NDArray[np.float64]:
    """-log softmax(head @ h)[target] of each token, (t,) float64, in nats.

    Args:
        hidden: (t, d).  targets: (t,).  head: (v, d).
    """
    return _losses_and_slopes(hidden, targets, head)[0]


def fit(
    base: States,
    adapters: States,
    targets: NDArray[np.int64],
    head: States,
    *,
    start: Array,
    penalty: float,
    max_steps: int = 30,
) -> Array:
    """Coefficients (k,) that minimise the surrogate's loss + penalty * ||w - start||^2.

    They may be negative and need not sum to one.

    Args:
        base: (t, d) states of the base.  adapters: (k, t, d) those of each adapter alone.
        targets: (t,) completion tokens.  head: (v, d).
        start: (k,) where the linearisation is pulled to.
        penalty: above 0; with few tokens it is what keeps k coefficients in bounds.
    """
    return fit_step(
        base, adapters - base, targets, head, start=start, penalty=penalty, max_steps=max_steps
    )


def fit_step(
    at: States,
    slopes: States,
    targets: NDArray[np.int64],
    head: States,
    *,
    start: Array,
    penalty: float,
    max_steps: int = 30,
) -> Array:
    """A step u (k,) from a point: least loss of `at + u . slopes`, plus penalty * ||u - start||^2.

    L-BFGS (scipy) from `start`.

    Args:
        at: (t, d) states at the point.  slopes: (k, t, d) of the states along each coefficient.
    """
    from scipy.optimize import minimize

    def objective(u: Array) -> tuple[float, Array]:
        losses, downhill = _losses_and_slopes(_moved(at, slopes, u), targets, head)
        gradient = np.einsum("ktd,td->k", slopes, downhill, dtype=np.float64) / len(targets)
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
    head: States,
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
        seen = at[~out], slopes[:, ~out], targets[~out]
        for i, penalty in enumerate(penalties):
            u = fit_step(*seen, head, start=start, penalty=penalty)
            sums[i] += token_losses(_moved(at[out], slopes[:, out], u), targets[out], head).sum()
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
    hidden: States, targets: NDArray[np.int64], head: States
) -> tuple[NDArray[np.float64], States]:
    """The loss of each token, and its gradient with respect to the token's state, (t, d)."""
    logits = hidden @ head.T
    rows = np.arange(len(targets))
    picked = logits[rows, targets].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    np.exp(logits - top, out=logits)
    total = logits.sum(axis=1, keepdims=True, dtype=np.float64)
    losses = np.asarray(np.log(total[:, 0]) + top[:, 0] - picked, np.float64)
    logits /= total.astype(np.float32)
    logits[rows, targets] -= 1.0
    return losses, np.asarray(logits @ head, np.float32)
