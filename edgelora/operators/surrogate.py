"""The logit-linear surrogate: coefficients by a convex problem on recorded forward passes.

Near the base, the state h(w) before the head is taken as linear in the coefficients,

    h(w) = h_0 + sum_i w_i (h_i - h_0),

h_0 the base's and h_i those of adapter i alone, each measured by one forward pass. Logits are
linear in h, so the loss of the completions is convex in w, and its minimum needs no more passes.
Whether the model agrees is for a real pass to say: the surrogate only proposes.
"""

from __future__ import annotations

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

    They may be negative and need not sum to one. L-BFGS (scipy) from `start`.

    Args:
        base: (t, d) states of the base.  adapters: (k, t, d) those of each adapter alone.
        targets: (t,) completion tokens.  head: (v, d).
        start: (k,) where the linearisation is pulled to.
        penalty: above 0; with few tokens it is what keeps k coefficients in bounds.
    """
    from scipy.optimize import minimize

    deltas = adapters - base

    def objective(w: Array) -> tuple[float, Array]:
        hidden = base + np.tensordot(w.astype(np.float32), deltas, axes=1)
        losses, slopes = _losses_and_slopes(hidden, targets, head)
        gradient = np.einsum("ktd,td->k", deltas, slopes, dtype=np.float64) / len(targets)
        away = w - start
        return (
            float(losses.mean() + penalty * (away**2).sum()),
            gradient + 2.0 * penalty * away,
        )

    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": max_steps})
    return np.asarray(found.x, np.float64)


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
