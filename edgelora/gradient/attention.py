"""Causal attention with grouped heads over packs that share a prefix, and its backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.gradient.weights import Array


@dataclass(frozen=True)
class Span:
    """Rows start to stop of a pack: one text that goes on from the pack's first `n_before` rows."""

    start: int
    stop: int
    n_before: int = 0

    @property
    def rows(self) -> slice:
        """Its own rows."""
        return slice(self.start, self.stop)


def attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """O = P V, P = softmax(s Q K^T), for each head; query i of n sees the keys up to i + m - n.

    Args:
        q: (n, heads, c); k, v: (m, groups, c) with m >= n. Head h uses group
            h // (heads / groups) (arXiv:2305.13245).

    Returns:
        (n, heads, c).
    """
    o = np.empty_like(q)
    mask = _mask(len(q), len(k), q)
    for group, heads in _groups(q, k):
        p = _probabilities(q[:, heads], k[:, group], mask, scale)
        o[:, heads] = (p @ v[:, group]).reshape(o[:, heads].shape)
    return o


def attention_backward(
    d_o: Array, q: Array, k: Array, v: Array, scale: float
) -> tuple[Array, Array, Array]:
    """d_V = P^T d_O, d_S = P (d_O V^T - rowsum(P d_O V^T)), d_Q = s d_S K, d_K = s d_S^T Q.

    P is computed anew. A group's keys and values get the sum over its heads.
    """
    d_q, d_k, d_v = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    mask = _mask(len(q), len(k), q)
    for group, heads in _groups(q, k):
        p = _probabilities(q[:, heads], k[:, group], mask, scale)
        out = d_o[:, heads].reshape(len(p), -1)
        d_v[:, group] = p.T @ out
        d_s = out @ v[:, group].T
        d_s -= np.einsum("nm,nm->n", p, d_s)[:, None]
        d_s *= p
        d_s *= d_s.dtype.type(scale)
        d_q[:, heads] = (d_s @ k[:, group]).reshape(d_q[:, heads].shape)
        d_k[:, group] = d_s.T @ q[:, heads].reshape(len(p), -1)
    return d_q, d_k, d_v


def packed_attention(q: Array, k: Array, v: Array, spans: Sequence[Span], scale: float) -> Array:
    """`attention` of each span over the rows before it and its own; arrays hold all t rows."""
    o = np.empty_like(q)
    for span in spans:
        o[span.rows] = attention(q[span.rows], _seen(k, span), _seen(v, span), scale)
    return o


def packed_attention_backward(
    d_o: Array, q: Array, k: Array, v: Array, spans: Sequence[Span], scale: float
) -> tuple[Array, Array, Array]:
    """The backward of `packed_attention`: a shared row gets the sum over all that saw it."""
    d_q, d_k, d_v = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    for span in spans:
        rows, n = span.rows, span.n_before
        d_q[rows], d_keys, d_values = attention_backward(
            d_o[rows], q[rows], _seen(k, span), _seen(v, span), scale
        )
        for total, part in ((d_k, d_keys), (d_v, d_values)):
            total[:n] += part[:n]
            total[rows] += part[n:]
    return d_q, d_k, d_v


def _seen(keys: Array, span: Span) -> Array:
    own = keys[span.rows]
    return np.concatenate([keys[: span.n_before], own]) if span.n_before else own


def _groups(q: Array, k: Array) -> Iterator[tuple[int, slice]]:
    n = q.shape[1] // k.shape[1]
    return ((group, slice(group * n, (group + 1) * n)) for group in range(k.shape[1]))


def _mask(n: int, m: int, like: Array) -> NDArray[np.floating]:
    """(n, 1, m): minus infinity where a query must not see a key."""
    hidden = np.arange(m) > np.arange(n)[:, None] + (m - n)
    return np.where(hidden, -np.inf, 0.0).astype(like.dtype)[:, None]


def _probabilities(q: Array, k: Array, mask: Array, scale: float) -> Array:
    """softmax(s Q K^T + mask) of a group's n * heads queries, (n * heads, m)."""
    n, n_heads, width = q.shape
    p = np.asarray((q * q.dtype.type(scale)).reshape(n * n_heads, width) @ k.T)
    by_query = p.reshape(n, n_heads, -1)
    by_query += mask
    p -= p.max(axis=1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    return p
