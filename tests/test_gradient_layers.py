"""Each function of a block against cases by hand and, in float64, against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gradient_cases import slope

from edgelora.gradient import layers
from edgelora.gradient.attention import (
    Span,
    attention,
    attention_backward,
    packed_attention,
    packed_attention_backward,
)

Arrays = tuple[np.ndarray, ...]


def check_backward(
    forward: Callable[..., np.ndarray], backward: Callable[..., Arrays], *inputs: np.ndarray
) -> None:
    """<d_y, forward> has the slopes that `backward(d_y)` gives, in a random direction each."""
    rng = np.random.default_rng(1)
    d_y = rng.standard_normal(forward(*inputs).shape)
    gradients = backward(d_y)
    assert len(gradients) == len(inputs)
    for i, gradient in enumerate(gradients):
        assert gradient.shape == inputs[i].shape
        direction = rng.standard_normal(inputs[i].shape)

        def along(t: float, i: int = i, direction: np.ndarray = direction) -> float:
            moved = [*inputs[:i], inputs[i] + t * direction, *inputs[i + 1 :]]
            return float(np.sum(d_y * forward(*moved)))

        expected = float(np.sum(gradient * direction))
        assert slope(along) == pytest.approx(expected, rel=1e-7, abs=1e-9)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def test_rms_norm_by_hand() -> None:
    x = np.array([[3.0, 4.0]])  # mean of squares 12.5
    assert layers.rms_norm(x, np.array([1.0, 2.0]), 0.0) == pytest.approx(
        np.array([[3 / 12.5**0.5, 8 / 12.5**0.5]])
    )


def test_rms_norm_backward() -> None:
    x, weight = normal(4, 3, 6), 1 + 0.1 * normal(6)
    check_backward(
        lambda x: layers.rms_norm(x, weight, 1e-5),
        lambda d_y: (layers.rms_norm_backward(d_y, x, weight, 1e-5),),
        x,
    )


def test_rms_norm_holds_large_residuals() -> None:
    x = np.float32(25_000) * normal(2, 64).astype(np.float32)
    y = layers.rms_norm(x, np.ones(64, np.float32), 1e-5)
    assert y == pytest.approx(layers.rms_norm(x.astype(float), np.ones(64), 1e-5), abs=1e-6)


@pytest.mark.parametrize(("neox", "turned"), [(False, [-2, 1, 3, 4]), (True, [-3, 2, 1, 4])])
def test_rotate_by_hand(neox: bool, turned: list[float]) -> None:
    """The first pair is turned by 90 degrees, the second not: neighbours, or halves."""
    x = np.array([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    assert layers.rotate(x, cos, sin, neox).ravel().tolist() == turned


@pytest.mark.parametrize("neox", [False, True])
def test_rotate_backward(neox: bool) -> None:
    x, angle = normal(5, 2, 8), normal(5, 4)
    cos, sin = np.cos(angle), np.sin(angle)
    check_backward(
        lambda x: layers.rotate(x, cos, sin, neox),
        lambda d_y: (layers.rotate(d_y, cos, -sin, neox),),
        x,
    )


def test_swiglu_by_hand() -> None:
    y = layers.swiglu(np.array([[0.0, np.log(3.0)]]), np.array([[5.0, 2.0]]))
    assert y == pytest.approx(np.array([[0.0, np.log(3.0) * 0.75 * 2]]))


def test_swiglu_backward() -> None:
    gate, up = normal(700, 300), normal(700, 300, seed=1)  # more than one piece
    check_backward(
        layers.swiglu, lambda d_y: layers.swiglu_backward(d_y, gate.copy(), up.copy()), gate, up
    )


def test_swiglu_of_extreme_gates_is_finite() -> None:
    gate, up = np.float32([[-1e4, 1e4]]), np.float32([[1, 1]])
    assert layers.swiglu(gate, up).tolist() == [[0.0, 1e4]]
    d_gate, d_up = layers.swiglu_backward(np.ones_like(gate), gate, up)
    assert d_gate.tolist() == [[0.0, 1.0]]
    assert d_up.tolist() == [[0.0, 1e4]]


@pytest.mark.parametrize("rank", [2, 40])  # 40: above the matrix's own, whose product is formed
def test_low_rank_backward(rank: int) -> None:
    x, lora_a, lora_b = normal(50, 6), normal(rank, 6), normal(5, rank)
    check_backward(
        lambda x: layers.low_rank(x, lora_a, lora_b),
        lambda d_y: (layers.low_rank_backward(d_y, lora_a, lora_b),),
        x,
    )


@pytest.mark.parametrize("rank", [2, 40])
def test_low_rank_slopes(rank: int) -> None:
    x, lora_a, lora_b = normal(50, 6), normal(rank, 6), normal(5, rank)
    check_backward(
        lambda coefficients: layers.low_rank(x, lora_a, lora_b * coefficients),
        lambda d_y: (layers.low_rank_slopes(d_y, x, lora_a, lora_b),),
        np.ones(rank),
    )


def test_low_rank_factors() -> None:
    x, lora_a, lora_b, scale = normal(7, 6), normal(2, 6), normal(5, 2), 1.7
    check_backward(
        lambda a, b: scale * layers.low_rank(x, a, b),
        lambda d_y: layers.low_rank_factors(d_y, x, lora_a, lora_b, scale),
        lora_a,
        lora_b,
    )


def test_cross_entropy_by_hand() -> None:
    value, gradient = layers.cross_entropy(np.log([[1.0, 3.0]]), np.array([1]))
    assert value == pytest.approx([-np.log(0.75)])
    assert gradient == pytest.approx(np.array([[0.25, -0.25]]))


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    value, gradient = layers.cross_entropy(np.float32([[1e4, -1e4]]), np.array([1]))
    assert value.tolist() == [2e4]
    assert gradient.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("objective", [layers.cross_entropy, layers.entropy])
def test_objectives_backward(objective: Callable[..., Arrays]) -> None:
    logits, targets = 3 * normal(6, 9), np.array([0, 8, 3, 3, 1, 5])
    check_backward(
        lambda z: objective(z.copy(), targets)[0],
        lambda d_y: (d_y[:, None] * objective(logits.copy(), targets)[1],),
        logits,
    )


def test_entropy_by_hand() -> None:
    value, _ = layers.entropy(np.zeros((1, 8)), np.array([0]))
    assert value == pytest.approx([np.log(8)])


def test_attention_by_hand() -> None:
    """The first query sees one key; the second weighs two that are alike to it."""
    q, k = np.ones((2, 1, 2)), np.ones((2, 1, 2))
    v = np.array([[[1.0, 0.0]], [[3.0, 8.0]]])
    assert attention(q, k, v, 0.5).tolist() == [[[1.0, 0.0]], [[2.0, 4.0]]]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("n_before", [0, 3])
def test_attention_backward(groups: int, n_before: int) -> None:
    q, k = normal(5, 4, 6), normal(5 + n_before, groups, 6)
    v = normal(5 + n_before, groups, 6, seed=1)
    check_backward(
        lambda q, k, v: attention(q, k, v, 0.4),
        lambda d_y: attention_backward(d_y, q, k, v, 0.4),
        q,
        k,
        v,
    )


def test_packed_attention_backward() -> None:
    spans = (Span(0, 3), Span(3, 7, 3), Span(7, 8, 3), Span(8, 12))
    q, k, v = normal(12, 4, 6), normal(12, 2, 6), normal(12, 2, 6, seed=1)
    check_backward(
        lambda q, k, v: packed_attention(q, k, v, spans, 0.4),
        lambda d_y: packed_attention_backward(d_y, q, k, v, spans, 0.4),
        q,
        k,
        v,
    )


def test_packed_texts_do_not_see_each_other() -> None:
    spans = (Span(0, 3), Span(3, 7, 3), Span(7, 10, 3))
    q, k, v = normal(10, 2, 4), normal(10, 2, 4, seed=1), normal(10, 2, 4, seed=2)
    packed = packed_attention(q, k, v, spans, 0.5)
    alone = [*range(3), *range(7, 10)]
    assert packed[7:] == pytest.approx(attention(q[alone], k[alone], v[alone], 0.5)[3:])
