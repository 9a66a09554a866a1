"""One block of a llama: its activations, its output, and its backward from these activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from edgelora.gradient import layers
from edgelora.gradient.attention import Span, packed_attention, packed_attention_backward
from edgelora.gradient.hyperparameters import Hyperparameters
from edgelora.gradient.observers import Observer
from edgelora.gradient.updates import Updates
from edgelora.gradient.weights import Array, Weights


def _unwatched(name: str, x: Array) -> None:
    """Nobody looks at the inputs."""


@dataclass(frozen=True, eq=False)
class Linears:
    """Matrices with their biases and with what the adapters add: y = x W^T + b + s x A^T B^T.

    Attributes:
        watch: shown the name of each matrix and its input x, (t, in), on the way forward.
    """

    weights: Weights
    updates: Updates
    watch: Callable[[str, Array], None] = _unwatched

    def forward(self, x: Array, stem: str) -> Array:
        """y (t, out) for x (t, in); `stem` is the tensor's name without `.weight`."""
        self.watch(f"{stem}.weight", x)
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
        lora_a, lora_b = np.asarray(pair.lora_a, dtype), np.asarray(pair.lora_b, dtype)
        return lora_a, lora_b if pair.scale == 1 else lora_b * dtype(pair.scale)


@dataclass(frozen=True, eq=False)
class Rows:
    """What a block knows of the rows of a pack: their spans, and RoPE's cos and sin (t, n / 2)."""

    spans: tuple[Span, ...]
    cos: Array
    sin: Array


@dataclass(frozen=True, eq=False)
class Activations:
    """What the backward of a block needs of its forward.

    Attributes:
        x: the input; normed, middle_normed: after the two norms; middle: after the attention half.
        raw_q, raw_k, q, k: before and after norm and RoPE; mixed: what attention gives.
        gate, up: of SwiGLU; the backward writes over them.
    """

    x: Array
    normed: Array
    raw_q: Array
    raw_k: Array
    q: Array
    k: Array
    v: Array
    mixed: Array
    middle: Array
    middle_normed: Array
    gate: Array
    up: Array

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


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

    def activations(self, x: Array) -> Activations:
        """All up to the last matrix, for x (t, d)."""
        normed = self._norm(x, "attn_norm")
        raw_q, raw_k, v = (
            self._heads(self._linear(normed, part)) for part in ("attn_q", "attn_k", "attn_v")
        )
        q = self._turn(self._norm(raw_q, "attn_q_norm"))
        k = self._turn(self._norm(raw_k, "attn_k_norm"))
        mixed = packed_attention(q, k, v, self._rows.spans, self._model.scale)
        mixed = mixed.reshape(len(x), -1)
        middle = x + self._linear(mixed, "attn_output")
        middle_normed = self._norm(middle, "ffn_norm")
        gate = self._linear(middle_normed, "ffn_gate")
        up = self._linear(middle_normed, "ffn_up")
        return Activations(x, normed, raw_q, raw_k, q, k, v, mixed, middle, middle_normed, gate, up)

    def output(self, of: Activations) -> Array:
        """y (t, d)."""
        return of.middle + self._linear(layers.swiglu(of.gate, of.up), "ffn_down")

    def backward(self, d_y: Array, of: Activations, observe: Observer) -> Array:
        """d_x (t, d) for the gradient d_y at the output."""
        d_middle = d_y + self._feed_forward_backward(d_y, of, observe)
        d_mixed = self._back(d_middle, of.mixed, "attn_output", observe)
        return d_middle + self._attention_backward(d_mixed, of, observe)

    def _feed_forward_backward(self, d_y: Array, of: Activations, observe: Observer) -> Array:
        d_product = self._back(d_y, layers.swiglu(of.gate, of.up), "ffn_down", observe)
        d_gate, d_up = layers.swiglu_backward(d_product, of.gate, of.up)
        del d_product
        d_normed = self._back(d_gate, of.middle_normed, "ffn_gate", observe)
        d_normed += self._back(d_up, of.middle_normed, "ffn_up", observe)
        return self._norm_back(d_normed, of.middle, "ffn_norm")

    def _attention_backward(self, d_mixed: Array, of: Activations, observe: Observer) -> Array:
        d_q, d_k, d_v = packed_attention_backward(
            self._heads(d_mixed), of.q, of.k, of.v, self._rows.spans, self._model.scale
        )
        d_q = self._norm_back(self._turn(d_q, back=True), of.raw_q, "attn_q_norm")
        d_k = self._norm_back(self._turn(d_k, back=True), of.raw_k, "attn_k_norm")
        d_normed = np.zeros_like(of.x)
        for part, d_part in (("attn_q", d_q), ("attn_k", d_k), ("attn_v", d_v)):
            d_normed += self._back(d_part.reshape(len(d_normed), -1), of.normed, part, observe)
        return self._norm_back(d_normed, of.x, "attn_norm")

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
