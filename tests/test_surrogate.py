"""The surrogate: one token by hand, derivatives by finite differences, minima by another method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import check_grad, minimize
from scipy.special import log_softmax

from edgelora.operators import surrogate
from edgelora.operators.surrogate import WholeHead

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    base: NDArray[np.float32]
    adapters: NDArray[np.float32]
    targets: NDArray[np.int64]
    head: NDArray[np.float32]
    start: Array

    def loss(self, w: Array, penalty: float) -> float:
        """The documented objective, typed anew in float64."""
        hidden = self.base + np.tensordot(w, self.adapters.astype(float) - self.base, axes=1)
        rows = log_softmax(hidden @ self.head.T.astype(float), axis=1)
        picked = rows[np.arange(len(self.targets)), self.targets]
        return float(-picked.mean() + penalty * ((w - self.start) ** 2).sum())

    def fit(self, penalty: float, max_steps: int = 30) -> Array:
        return surrogate.fit_step(
            self.base, self.adapters - self.base, self.targets, self.tiled,
            start=self.start, penalty=penalty, max_steps=max_steps,
        )  # fmt: skip

    @property
    def tiled(self) -> surrogate.Head:
        """The head in tiles of four rows, the last of them smaller."""
        return Tiles(self.head, 4)


@dataclass(frozen=True)
class Tiles:
    matrix: NDArray[np.float32]
    n: int

    def tiles(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """In one buffer, which the next tile overwrites."""
        buffer = np.empty((self.n, self.matrix.shape[1]), np.float32)
        for first in range(0, len(self.matrix), self.n):
            part = self.matrix[first : first + self.n]
            buffer[: len(part)] = part
            yield first, buffer[: len(part)]


@pytest.fixture(scope="module")
def case() -> Case:
    """3 adapters, 20 tokens, states of 5 numbers, 11 words."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((20, 5)).astype(np.float32)
    moves = 0.7 * rng.standard_normal((3, 20, 5)).astype(np.float32)
    head = rng.standard_normal((11, 5)).astype(np.float32)
    return Case(base, base + moves, rng.integers(0, 11, 20), head, np.full(3, 1 / 3))


def test_one_token_by_hand() -> None:
    """Two words, whose logits are h and -h: the loss of the first is log(1 + exp(-2 h))."""
    hidden = np.array([[0.0], [0.5]], np.float32)
    head = np.array([[1.0], [-1.0]], np.float32)
    losses = surrogate.token_losses(hidden, np.array([0, 0]), WholeHead(head))
    assert losses == pytest.approx([math.log(2), math.log(1 + math.exp(-1))], rel=1e-6)


def test_a_minimum_by_hand() -> None:
    """Targets one of each word: by symmetry the best state is 0, where only w = -1 leads."""
    base, adapter = np.full((2, 1), 1.0, np.float32), np.full((1, 2, 1), 2.0, np.float32)
    head = WholeHead(np.array([[1.0], [-1.0]], np.float32))
    (w,) = surrogate.fit_step(
        base, adapter - base, np.array([0, 1]), head, start=np.zeros(1), penalty=1e-9
    )
    assert w == pytest.approx(-1.0, abs=1e-3)


def test_losses_are_those_of_a_log_softmax(case: Case) -> None:
    losses = surrogate.token_losses(case.base, case.targets, case.tiled)
    rows = log_softmax(case.base.astype(float) @ case.head.T.astype(float), axis=1)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, -rows[np.arange(20), case.targets], rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2])
def test_large_logits_do_not_overflow(n: int) -> None:
    hidden, matrix = np.array([[1e3]], np.float32), np.array([[1.0], [-1.0]], np.float32)
    assert surrogate.token_losses(hidden, np.array([1]), Tiles(matrix, n)) == pytest.approx([2e3])
    backwards = Tiles(matrix[::-1].copy(), n)
    assert surrogate.token_losses(hidden, np.array([0]), backwards) == pytest.approx([2e3])


@pytest.mark.parametrize("n", [1, 3, 4, 11])
def test_tiles_of_the_head_change_nothing(case: Case, n: int) -> None:
    whole = surrogate._losses_and_slopes(case.base, case.targets, WholeHead(case.head))
    found = surrogate._losses_and_slopes(case.base, case.targets, Tiles(case.head, n))
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], whole[1], atol=2e-6)
    softmax = np.exp(log_softmax(case.base.astype(float) @ case.head.T.astype(float), axis=1))
    softmax[np.arange(20), case.targets] -= 1
    np.testing.assert_allclose(whole[1], softmax @ case.head, atol=2e-6)


def test_tokens_that_are_not_seen_do_not_count(case: Case) -> None:
    seen = np.arange(20) % 3 > 0
    part = Case(case.base[seen], case.adapters[:, seen], case.targets[seen], case.head, case.start)
    found = surrogate.fit_step(
        case.base, case.adapters - case.base, case.targets, case.tiled,
        start=case.start, penalty=0.1, seen=seen,
    )  # fmt: skip
    np.testing.assert_allclose(found, part.fit(0.1), atol=1e-4)


def test_the_slopes_are_the_gradient(case: Case) -> None:
    """Of each token's loss with respect to its state, against scipy's finite differences."""

    def value(h: Array) -> float:
        state = h.reshape(1, -1).astype(np.float32)
        return float(surrogate.token_losses(state, case.targets[:1], case.tiled)[0])

    def slope(h: Array) -> Array:
        state = h.reshape(1, -1).astype(np.float32)
        _, slopes = surrogate._losses_and_slopes(state, case.targets[:1], case.tiled)
        return slopes[0].astype(float)

    at = case.base[0].astype(float)
    # In float32 a step of 1e-2 balances rounding against curvature.
    assert check_grad(value, slope, at, epsilon=1e-2) < 0.05


def numeric_gradient(f: Callable[[Array], float], w: Array, step: float = 1e-6) -> Array:
    return np.array([(f(w + e) - f(w - e)) / (2 * step) for e in step * np.eye(len(w))])


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_gradient_vanishes_where_it_stops(case: Case, penalty: float) -> None:
    found = case.fit(penalty, max_steps=200)
    assert np.abs(numeric_gradient(lambda w: case.loss(w, penalty), found)).max() < 1e-3


def test_the_loss_is_convex_along_segments(case: Case) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        a, b, t = 3 * rng.standard_normal(3), 3 * rng.standard_normal(3), rng.uniform()
        between = case.loss(t * a + (1 - t) * b, 0.0)
        assert between <= t * case.loss(a, 0.0) + (1 - t) * case.loss(b, 0.0) + 1e-9


@pytest.mark.parametrize("penalty", [0.01, 0.3, 5.0])
def test_the_minimum_is_that_of_a_method_without_derivatives(case: Case, penalty: float) -> None:
    reference = minimize(
        lambda w: case.loss(w, penalty), np.zeros(3), method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 4000},
    )  # fmt: skip
    found = case.fit(penalty, max_steps=200)
    np.testing.assert_allclose(found, reference.x, atol=2e-3)
    assert case.loss(found, penalty) == pytest.approx(reference.fun, abs=1e-6)


def test_a_large_penalty_keeps_the_start_and_a_small_one_improves(case: Case) -> None:
    np.testing.assert_allclose(case.fit(1e6), case.start, atol=1e-4)
    assert case.loss(case.fit(0.01), 0.0) < case.loss(case.start, 0.0)


def test_a_step_from_a_point_is_the_fit_of_the_moved_problem(case: Case) -> None:
    """Linear states: a step from any point, with its penalty, is the fit with the start moved."""
    deltas = case.adapters - case.base
    point = np.array([0.4, -0.2, 0.1])
    at = (case.base + np.tensordot(point, deltas, axes=1)).astype(np.float32)
    step = surrogate.fit_step(
        at, deltas, case.targets, case.tiled, start=case.start - point, penalty=0.3, max_steps=200
    )
    np.testing.assert_allclose(point + step, case.fit(0.3, max_steps=200), atol=2e-3)


def test_linearising_again_reaches_the_minimum_of_a_curved_loss(case: Case) -> None:
    """States that bend with the coefficients: steps end where scipy finds the true minimum."""
    deltas = (case.adapters - case.base).astype(float)

    def states(w: Array) -> Array:
        return np.tanh(case.base + np.tensordot(w, deltas, axes=1))

    def loss(w: Array) -> float:
        rows = log_softmax(states(w) @ case.head.T.astype(float), axis=1)
        return float(-rows[np.arange(20), case.targets].mean())

    w, losses = np.zeros(3), [loss(np.zeros(3))]
    for _ in range(30):
        here = states(w)
        slopes = np.array([(states(w + 0.01 * e) - here) / 0.01 for e in np.eye(3)])
        step = surrogate.fit_step(
            here.astype(np.float32), slopes.astype(np.float32), case.targets, case.tiled,
            start=np.zeros(3), penalty=0.05,
        )  # fmt: skip
        fraction, found = surrogate.shrink(lambda f, w=w, s=step: loss(w + f * s), losses[-1])
        w = w + fraction * step
        losses.append(found)
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    reference = min(
        minimize(loss, start, method="Nelder-Mead", options={"maxiter": 4000}).fun
        for start in (np.zeros(3), w)
    )
    assert losses[-1] == pytest.approx(reference, abs=2e-3)


def test_held_out_losses_are_those_of_fits_without_the_fold(case: Case) -> None:
    """Five examples of four tokens in two folds: typed anew with the public fit."""
    owners = np.repeat(np.arange(5), 4)
    deltas = case.adapters - case.base
    start = np.zeros(3)
    found = surrogate.held_out_losses(
        case.base, deltas, case.targets, case.tiled, owners, start=start, penalties=(0.05, 2.0)
    )
    for penalty, told in zip((0.05, 2.0), found, strict=True):
        total = 0.0
        for out in (np.isin(owners, (0, 2, 4)), np.isin(owners, (1, 3))):
            part = Case(
                case.base[~out], case.adapters[:, ~out], case.targets[~out], case.head, start
            )
            rest = Case(case.base[out], case.adapters[:, out], case.targets[out], case.head, start)
            total += rest.loss(part.fit(penalty), 0.0) * int(out.sum())
        assert told == pytest.approx(total / 20, abs=1e-4)
    with pytest.raises(ValueError, match="3 folds of 2 examples"):
        surrogate.held_out_losses(
            case.base[:4], deltas[:, :4], case.targets[:4], case.tiled, np.array([0, 0, 1, 1]),
            start=start, penalties=(1.0,), n_folds=3,
        )  # fmt: skip


def test_a_step_is_shrunk_until_a_real_loss_agrees() -> None:
    asked = []

    def loss(fraction: float) -> float:
        asked.append(fraction)
        return abs(fraction - 0.25)

    assert surrogate.shrink(loss, 0.5) == (0.5, 0.25) and asked == [1.0, 0.5]
    assert surrogate.shrink(loss, 0.1) == (0.25, 0.0)
    assert surrogate.shrink(lambda fraction: math.nan, 0.1) == (0.0, 0.1)
    assert surrogate.shrink(lambda fraction: 1.0, 0.1) == (0.0, 0.1)
