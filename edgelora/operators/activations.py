"""Coefficients from what adapters do to a prompt's activations: LoGo and Arrow. No labels needed.

Both were made to choose anew for each prompt, Arrow even for each token and matrix. A file holds
one combination, so here their weights are averaged over the prompts, and over the tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LOGO_COUNT = 20
ARROW_COUNT = 3
ARROW_TEMPERATURE = 1.0
Array = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]


def update_norms(x: Floats, lora_a: Floats, lora_b: Floats, scale: float) -> Array:
    """`||s B A x||` for each row of x, without forming B A: (t,) float64.

    Args:
        x: (t, in), inputs of the matrix.  lora_a: (r, in).  lora_b: (out, r).

    Example:
        >>> update_norms(np.eye(2), np.array([[3.0, 0.0]]), np.array([[0.0], [2.0]]), 0.5).tolist()
        [3.0, 0.0]
    """
    inner = np.asarray(x @ lora_a.T, np.float64)
    b = np.asarray(lora_b, np.float64)
    squares = np.einsum("tr,rs,ts->t", inner, b.T @ b, inner, optimize=True)
    return np.asarray(abs(scale) * np.sqrt(np.maximum(squares, 0.0)))


def top_direction(lora_a: Floats, lora_b: Floats) -> Array:
    """The top right singular vector of B A, (in,) float64 of length 1; its sign means nothing.

    Zeros where B A is zero. B = Q R, so that of the small R A is the same; its left one comes from
    the (r, r) Gram matrix.
    """
    from scipy.linalg import eigh, qr

    (r_b,) = qr(np.asarray(lora_b, np.float64), mode="r", check_finite=False)
    core = r_b[: min(lora_b.shape)] @ np.asarray(lora_a, np.float64)
    last = len(core) - 1
    _, vectors = eigh(core @ core.T, subset_by_index=(last, last), check_finite=False)
    direction = vectors[:, 0] @ core
    length = float(np.linalg.norm(direction))
    return np.asarray(direction / length if length > 0 else direction)


def logo(norms: ArrayLike, *, count: int = LOGO_COUNT) -> Array:
    """LoGo's weights, averaged over prompts: (k,) float64 on the simplex (arXiv:2511.07129).

    For each prompt the `count` adapters of the largest score share the weight in proportion to it.
    There the adapters are chosen again for each prompt, and the scores are taken while all of them
    are active; here they come from the base alone.

    Args:
        norms: (k, n), `||s B A x||` of each adapter at the last token of each of n prompts.

    Raises:
        ValueError: no prompts, a score that is negative or no number, or all scores of a prompt 0.

    Example:
        >>> logo([[3.0], [1.0], [0.5]], count=2).tolist()
        [0.75, 0.25, 0.0]
    """
    scores = _checked(norms)
    if (scores < 0).any() or not scores.any(axis=0).all():
        raise ValueError("a norm is negative, or no adapter does anything to a prompt")
    kept = np.where(_largest(scores, count), scores, 0.0)
    return np.asarray((kept / kept.sum(axis=0)).mean(axis=1))


def arrow(
    projections: ArrayLike,
    token_weights: ArrayLike,
    *,
    count: int = ARROW_COUNT,
    temperature: float = ARROW_TEMPERATURE,
) -> Array:
    """Arrow's weights in one matrix, averaged over tokens: (k,) on the simplex (arXiv:2405.11157).

    For each token, softmax(|v_i . x| / temperature) over the `count` adapters where it is largest,
    v_i the `top_direction` of adapter i; count and temperature are those of its version in PEFT.

    Args:
        projections: (k, t), v_i . x or their absolute values.
        token_weights: (t,), not negative: how much each token counts.

    Raises:
        ValueError: no tokens, a value that is no number, or weights that are all 0.

    Example:
        >>> arrow([[-5.0, 0.0], [0.0, 5.0]], [3.0, 1.0], count=1).tolist()
        [0.75, 0.25]
    """
    logits = np.abs(_checked(projections)) / temperature
    weights = np.asarray(token_weights, np.float64)
    if weights.shape != logits.shape[1:] or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"token weights of shape {weights.shape}, or negative, or all 0")
    kept = np.where(_largest(logits, count), logits, -np.inf)
    shares = np.exp(kept - kept.max(axis=0))
    return np.asarray((shares / shares.sum(axis=0)) @ (weights / weights.sum()))


def _largest(scores: Array, count: int) -> NDArray[np.bool_]:
    """Where the `count` largest of each column are; the first of equals."""
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    places = np.argsort(-scores, axis=0, kind="stable")[:count]
    found = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(found, places, True, axis=0)
    return found


def _checked(values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"scores of shape {array.shape}, or not finite")
    return array
