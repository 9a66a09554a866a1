"""The functions of a llama block, each beside its backward: arrays in, arrays out.

t tokens, d the embedding, r a rank. A `d_` before a name is the gradient of the loss with respect
to it. All work in the dtype of what they are given.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelora.gradient.weights import Array

# Elementwise work in pieces that stay in the cache.
_PIECE = 1 << 16


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """y = w x r over the last axis, r = (mean(x^2) + eps)^(-1/2) (arXiv:1910.07467, eq. 4)."""
    y = x * _inverse_rms(x, eps)
    y *= weight
    return np.asarray(y)


def rms_norm_backward(d_y: Array, x: Array, weight: Array, eps: float) -> Array:
    """d_x = r (w d_y) - x r^3 mean(w d_y x)."""
    r = _inverse_rms(x, eps)
    d_x = d_y * weight
    d_x -= x * (r * r * _mean_product(d_x, x))
    d_x *= r
    return np.asarray(d_x)


def _inverse_rms(x: Array, eps: float) -> Array:
    return np.asarray(1 / np.sqrt(_mean_product(x, x) + x.dtype.type(eps)))


def _mean_product(a: Array, b: Array) -> Array:
    """mean(a b) over the last axis, which stays with length 1; the product is never stored."""
    return np.asarray(np.einsum("...d,...d->...", a, b)[..., None] / a.dtype.type(a.shape[-1]))


def rotate(x: Array, cos: Array, sin: Array, neox: bool) -> Array:
    """RoPE (arXiv:2104.09864, eq. 34): each pair (a, b) becomes (a cos - b sin, a sin + b cos).

    Pairs are neighbours (0, 1), (2, 3) ... in llama's GGUF, whose rows of Q and K are permuted for
    it; with `neox` they are (0, n/2), (1, n/2 + 1) ... The inverse, which is also the backward, is
    the rotation with -sin.

    Args:
        x: (t, heads, n); cos, sin: (t, n / 2).
    """
    cos, sin = cos[:, None], sin[:, None]
    if neox:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    turn = cos + 1j * sin  # neighbours are the parts of a complex number, in one sweep
    turned = np.ascontiguousarray(x).view(turn.dtype) * turn
    return np.asarray(turned.view(x.dtype))


def swiglu(gate: Array, up: Array) -> Array:
    """y = silu(gate) up, silu(g) = g / (1 + exp(-g)) (arXiv:2002.05202, eq. 6)."""
    y = np.empty_like(gate)
    for rows in _pieces(gate):
        y[rows] = gate[rows] * _sigmoid(gate[rows]) * up[rows]
    return y


def swiglu_backward(d_y: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """d_gate = d_y up s (1 + gate (1 - s)), d_up = d_y gate s, with s = sigmoid(gate).

    They are written over `gate` and `up`, the largest arrays of a block.
    """
    for rows in _pieces(gate):
        s = _sigmoid(gate[rows])
        silu = gate[rows] * s
        gate[rows] = d_y[rows] * up[rows] * (s + silu * (1 - s))
        up[rows] = d_y[rows] * silu
    return gate, up


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) may be infinite, its inverse is 0 then
        return np.asarray(1 / (1 + np.exp(-x)))


def low_rank(x: Array, lora_a: Array, lora_b: Array) -> Array:
    """y = x A^T B^T, what a LoRA adds (arXiv:2106.09685, eq. 3; the scale is in B)."""
    if _is_product_cheaper(len(x), lora_a, lora_b):
        return np.asarray(x @ (lora_b @ lora_a).T)
    return np.asarray((x @ lora_a.T) @ lora_b.T)


def low_rank_backward(d_y: Array, lora_a: Array, lora_b: Array) -> Array:
    """d_x = d_y B A."""
    if _is_product_cheaper(len(d_y), lora_a, lora_b):
        return np.asarray(d_y @ (lora_b @ lora_a))
    return np.asarray((d_y @ lora_b) @ lora_a)


def low_rank_slopes(d_y: Array, x: Array, lora_a: Array, lora_b: Array) -> Array:
    """The slope along the coefficient of each component b_r a_r: sum_t (d_y B)_tr (x A^T)_tr."""
    if _is_product_cheaper(len(x), lora_a, lora_b):
        return np.asarray(np.einsum("or,or->r", lora_b, (d_y.T @ x) @ lora_a.T))
    products = x @ lora_a.T
    products *= d_y @ lora_b
    return np.asarray(products.sum(axis=0, dtype=np.float64))


def _is_product_cheaper(t: int, lora_a: Array, lora_b: Array) -> bool:
    """Whether (r + t) out in, with an (out, in) matrix in between, is less than t r (in + out).

    Many adapters at once can have a higher rank than the matrix itself.
    """
    (r, n_in), n_out = lora_a.shape, len(lora_b)
    return bool((r + t) * n_in * n_out < t * r * (n_in + n_out))


def low_rank_factors(
    d_y: Array, x: Array, lora_a: Array, lora_b: Array, scale: float
) -> tuple[Array, Array]:
    """The gradients of the factors of y = s x A^T B^T: d_A = s (d_y B)^T x, d_B = s d_y^T x A^T."""
    return scale * ((d_y @ lora_b).T @ x), scale * (d_y.T @ (x @ lora_a.T))


def cross_entropy(logits: Array, targets: NDArray[np.integer]) -> tuple[Array, Array]:
    """-log softmax(z)[target] of each row, and its gradient softmax(z) - onehot(target).

    The gradient is written over `logits` (n, vocabulary).
    """
    rows = np.arange(len(logits))
    logits -= logits.max(axis=1, keepdims=True)
    picked = logits[rows, targets]
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    logits /= total
    logits[rows, targets] -= 1
    return np.log(total[:, 0]) - picked, logits


def entropy(logits: Array, targets: NDArray[np.integer]) -> tuple[Array, Array]:
    """H = -sum p log p of each row, and its gradient -p (log p + H); the targets are not used.

    What AdaMerging minimises on texts without answers (arXiv:2310.02575, eq. 6). The gradient is
    written over `logits` (n, vocabulary).
    """
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(logits)
    value = -(p * logits).sum(axis=1)
    logits += value[:, None]
    logits *= -p
    return value, logits


def _pieces(x: Array) -> list[slice]:
    step = max(1, _PIECE // x.shape[-1])
    return [slice(start, start + step) for start in range(0, len(x), step)]
