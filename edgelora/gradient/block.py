"""One block of a llama: its forward, and its backward, which computes the forward again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgelora.gradient import layers
from edgelora.gradient.attention import Span, packed_attention, packed_attention_backward
from edgelora.gradient.hyperparameters import Hyperparameters
from edgelora.gradient.observers import Observer
from edgelora.gradient.updates import Updates
from edgelora.gradient.weights import Array, Weights


@dataclass(frozen=True, eq=False)
class Linears:
    """Matrices with their biases and with what the adapters add: y = x W^T + b + s x A^T B^T."""

    weights: Weights
    updates: Updates

    def forward(self, x: Array, stem: str) -> Array:
        """y (t, out) for x (t, in); `stem` is the tensor's name without `.weight`."""
        y = self.weights.times(x, f"{stem}.weight")
        if f"{stem}.bias" in self.weights:
            y += self.weights.vector(f"{stem}.bias")
        factors = self._factors(stem)
        if factors:
            y += layers.low_rank(x, *factors)
        return y

    def backward(self, d_y: Array, x: Array, stem: str, observe: Observer) -> Array:
        """d_x = d_y W + s d_y B A; the observer is shown x and d_y."""
        observe(f"{stem}.weight", x, d_y)
        d_x = self.weights.times_back(d_y, f"{stem}.weight")
        factors = self._factors(stem)
        if factors:
            d_x += layers.low_rank_backward(d_y, *factors)
        return d_x

    def _factors(self, stem: str) -> tuple[Array, Array] | None:
        pair = self.updates.get(f"{stem}.weight")
        if pair is None:
            return None
        dtype = self.weights.dtype
        return np.asarray(pair.lora_a, dtype), np.asarray(pair.lora_b, dtype) * dtype(pair.scale)


@dataclass(frozen=True, eq=False)
class Rows:
    """What a block knows of the rows of a pack: their spans, and RoPE's cos and sin (t, n / 2)."""

    spans: tuple[Span, ...]
    cos: Array
    sin: Array


@dataclass(frozen=True, eq=False)
class _Half:
    """The attention half: normed input, Q and K before and after norm and RoPE, V, output."""

    normed: Array
    raw_q: Array
    raw_k: Array
    q: Array
    k: Array
    v: Array
    mixed: Array


class Block:
    """Layer `number` of a model, on the rows of one pack.

        m = x + Wo attention(rope(Wq h), rope(Wk h), Wv h),  h = norm(x)
        y = m + Wd swiglu(Wg h', Wu h'),                      h' = norm(m)

    qwen3 norms each head of Q and K before RoPE.
    """

    def __init__(self, number: int, linears: Linears, model: Hyperparameters, rows: Rows) -> None:
        self._at = f"blk.{number}."
        self._linears = linears
        self._model = model
        self._rows = rows

    def forward(self, x: Array) -> Array:
        """y (t, d) for x (t, d)."""
        y = x + self._linear(self._attention(x).mixed, "attn_output")
        normed = self._norm(y, "ffn_norm")
        gate, up = self._linear(normed, "ffn_gate"), self._linear(normed, "ffn_up")
        y += self._linear(layers.swiglu(gate, up), "ffn_down")
        return y

    def backward(self, d_y: Array, x: Array, observe: Observer) -> Array:
        """d_x (t, d) for the gradient d_y at the output; the forward is computed again from x."""
        half = self._attention(x)
        middle = x + self._linear(half.mixed, "attn_output")
        d_middle = d_y + self._feed_forward_backward(d_y, middle, observe)
        d_mixed = self._back(d_middle, half.mixed, "attn_output", observe)
        return d_middle + self._attention_backward(d_mixed, x, half, observe)

    def _feed_forward_backward(self, d_y: Array, middle: Array, observe: Observer) -> Array:
        normed = self._norm(middle, "ffn_norm")
        gate, up = self._linear(normed, "ffn_gate"), self._linear(normed, "ffn_up")
        d_product = self._back(d_y, layers.swiglu(gate, up), "ffn_down", observe)
        d_gate, d_up = layers.swiglu_backward(d_product, gate, up)
        del d_product
        d_normed = self._back(d_gate, normed, "ffn_gate", observe)
        d_normed += self._back(d_up, normed, "ffn_up", observe)
        return self._norm_back(d_normed, middle, "ffn_norm")

    def _attention(self, x: Array) -> _Half:
        normed = self._norm(x, "attn_norm")
        raw_q, raw_k, v = (
            self._heads(self._linear(normed, part)) for part in ("attn_q", "attn_k", "attn_v")
        )
        q = self._turn(self._norm(raw_q, "attn_q_norm"))
        k = self._turn(self._norm(raw_k, "attn_k_norm"))
        mixed = packed_attention(q, k, v, self._rows.spans, self._model.scale)
        return _Half(normed, raw_q, raw_k, q, k, v, mixed.reshape(len(x), -1))

    def _attention_backward(
        self, d_mixed: Array, x: Array, half: _Half, observe: Observer
    ) -> Array:
        d_q, d_k, d_v = packed_attention_backward(
            self._heads(d_mixed), half.q, half.k, half.v, self._rows.spans, self._model.scale
        )
        d_q = self._norm_back(self._turn(d_q, back=True), half.raw_q, "attn_q_norm")
        d_k = self._norm_back(self._turn(d_k, back=True), half.raw_k, "attn_k_norm")
        d_normed = np.zeros_like(x)
        for part, d_part in (("attn_q", d_q), ("attn_k", d_k), ("attn_v", d_v)):
            d_normed += self._back(d_part.reshape(len(x), -1), half.normed, part, observe)
        return self._norm_back(d_normed, x, "attn_norm")

    def _linear(self, x: Array, part: str) -> Array:
        return self._linears.forward(x, self._at + part)

    def _back(self, d_y: Array, x: Array, part: str, observe: Observer) -> Array:
        return self._linears.backward(d_y, x, self._at + part, observe)

    def _norm(self, x: Array, part: str) -> Array:
        """The norm of this name; x itself where the model has none (of Q and K)."""
        name = f"{self._at}{part}.weight"
        weights = self._linears.weights
        return layers.rms_norm(x, weights.vector(name), self._model.eps) if name in weights else x

    def _norm_back(self, d_y: Array, x: Array, part: str) -> Array:
        name = f"{self._at}{part}.weight"
        weights = self._linears.weights
        if name not in weights:
            return d_y
        return layers.rms_norm_backward(d_y, x, weights.vector(name), self._model.eps)

    def _heads(self, rows: Array) -> Array:
        return rows.reshape(len(rows), -1, self._model.head_dim)

    def _turn(self, heads: Array, *, back: bool = False) -> Array:
        sin = -self._rows.sin if back else self._rows.sin
        return layers.rotate(heads, self._rows.cos, sin, self._model.neox)
