"""Searches by losses: fields and steps by hand, minima by scipy, what they do when spent."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from edgelora.operators import searches
from edgelora.operators.searches import (
    Found,
    Spent,
    along_axes,
    cma_es,
    is_hopeless,
    successive_halving,
)

Array = NDArray[np.float64]


class Field:
    """Losses of k arms on n examples of one or more tokens, with a record of what was asked."""

    def __init__(self, nll: Array, tokens: Array, n_calls: float = math.inf) -> None:
        self.nll, self.tokens, self.left = nll, tokens, n_calls
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, arm: int, first: int, end: int) -> tuple[Array, Array]:
        if len(self.asked) >= self.left:
            raise Spent
        self.asked.append((arm, first, end))
        return self.nll[arm, first:end], self.tokens[first:end]


def test_a_field_by_hand() -> None:
    """Five arms of losses 5, 1, 4, 2, 3 on every token, of which two are kept."""
    tokens = np.array([1.0, 2.0, 1.0, 3.0, 1.0, 2.0])
    field = Field(np.outer([5.0, 1.0, 4.0, 2.0, 3.0], tokens), tokens)
    found = successive_halving(field, 5, 6, n_first=2, n_kept=2)
    # All five see two examples; the better two see the rest, for no more need to be dropped.
    assert field.asked == [(arm, 0, 2) for arm in range(5)] + [(1, 2, 6), (3, 2, 6)]
    assert found.tolist() == [math.inf, 1.0, math.inf, 2.0, math.inf]


def test_rungs_double_until_few_are_left() -> None:
    losses = np.outer(np.arange(16.0), np.ones(40))
    field = Field(losses, np.ones(40))
    found = successive_halving(field, 16, 40, n_first=4, n_kept=3)
    rungs = {(first, end): sum(a[1:] == (first, end) for a in field.asked)
             for _, first, end in field.asked}  # fmt: skip
    assert rungs == {(0, 4): 16, (4, 8): 8, (8, 16): 4, (16, 40): 3}
    assert np.flatnonzero(np.isfinite(found)).tolist() == [0, 1, 2]


def test_those_that_last_have_the_loss_of_all_examples() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 6, 24).astype(float)
    nll = rng.gamma(2.0, 1.0, (20, 24)) * tokens + np.linspace(0, 9, 20)[:, None] * tokens
    found = successive_halving(Field(nll, tokens), 20, 24, n_kept=4)
    kept = np.isfinite(found)
    assert kept.sum() == 5 or kept.sum() == 4
    np.testing.assert_allclose(found[kept], (nll.sum(axis=1) / tokens.sum())[kept])
    # Far apart as they are, the best by all examples is the best found.
    assert found.argmin() == nll.sum(axis=1).argmin()


def test_few_examples_or_arms_end_a_halving_at_once() -> None:
    field = Field(np.array([[1.0, 1.0], [2.0, 2.0]]), np.ones(2))
    assert successive_halving(field, 2, 2).tolist() == [1.0, 2.0]
    assert len(field.asked) == 2
    with pytest.raises(ValueError, match="0 arms"):
        successive_halving(field, 0, 2)


def test_a_halving_that_is_spent_keeps_the_last_whole_rung() -> None:
    losses = np.outer(np.arange(8.0), np.ones(16))
    for n_calls, n_finite in ((3, 0), (8, 4), (10, 4), (12, 2)):
        found = successive_halving(Field(losses, np.ones(16), n_calls), 8, 16, n_kept=1)
        assert np.isfinite(found).sum() == n_finite
        if n_finite:
            assert found.argmin() == 0


def bowl(n: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((n, n))
    return factor @ factor.T / n + 0.3 * np.eye(n), rng.uniform(-1, 1, n)


class Quadratic:
    """(x - centre) H (x - centre) / 2, which counts, and has so many measurements."""

    def __init__(self, n: int, left: float = math.inf) -> None:
        self.hessian, self.centre = bowl(n)
        self.points: list[Array] = []
        self.left = left

    def __call__(self, x: Array) -> float:
        if len(self.points) >= self.left:
            raise Spent
        self.points.append(np.array(x))
        away = x - self.centre
        return float(away @ self.hessian @ away) / 2


def test_one_axis_by_hand() -> None:
    """From 0 by 1 to 3 and back by halves: the least of |x - 2.6| on the grid is 2.5."""
    found = along_axes(lambda x: abs(float(x[0]) - 2.6), np.zeros(1), step=1.0, least_step=0.5)
    assert found.point.tolist() == [2.5] and found.loss == pytest.approx(0.1)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_axes_lead_to_the_minimum_that_scipy_finds(n: int) -> None:
    loss = Quadratic(n)
    reference = minimize(loss, np.zeros(n), method="Nelder-Mead", options={"xatol": 1e-6})
    found = along_axes(loss, np.zeros(n), least_step=1e-4, max_measured=10_000)
    np.testing.assert_allclose(found.point, reference.x, atol=2e-3)
    assert found.loss == pytest.approx(loss(found.point))


@pytest.mark.parametrize("n", [1, 2, 8])
def test_cma_es_leads_to_the_minimum(n: int) -> None:
    loss = Quadratic(n)
    found = cma_es(loss, np.zeros(n), max_measured=3_000 if n > 1 else 80)
    np.testing.assert_allclose(found.point, loss.centre, atol=1e-3 if n > 1 else 0.1)


def test_cma_es_is_repeatable_and_leaves_numpy_s_generator_alone() -> None:
    np.random.seed(3)
    expected = np.random.get_state()[1].tolist()
    a, b, c = (cma_es(Quadratic(4), np.zeros(4), seed=seed) for seed in (0, 0, 1))
    assert np.random.get_state()[1].tolist() == expected
    assert a.point.tolist() == b.point.tolist() != c.point.tolist()


@pytest.mark.parametrize("search", [along_axes, cma_es])
@pytest.mark.parametrize("left", [1, 2, 17])
def test_what_is_spent_gives_the_best_so_far(search: object, left: int) -> None:
    loss = Quadratic(4, left)
    found = search(loss, np.zeros(4))  # type: ignore[operator]
    assert isinstance(found, Found) and found.n_measured == left == len(loss.points)
    best = min(loss.points, key=Quadratic(4))
    assert found.point.tolist() == best.tolist() and found.loss == Quadratic(4)(best)
    with pytest.raises(Spent):
        search(Quadratic(4, 0), np.zeros(4))  # type: ignore[operator]


@pytest.mark.parametrize("search", [along_axes, cma_es])
def test_no_more_is_measured_than_was_allowed(search: object) -> None:
    loss = Quadratic(6)
    found = search(loss, np.zeros(6), max_measured=25)  # type: ignore[operator]
    assert found.n_measured == len(loss.points) <= 25


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    def broken(x: Array) -> float:
        return math.inf if x[0] > 0.1 else float((x[0] + 1) ** 2 + x[1] ** 2)

    for search in (along_axes, cma_es):
        found = search(broken, np.zeros(2))
        assert found.loss < 1.0 and found.point[0] < 0


def test_hopeless_is_worse_by_more_than_the_noise() -> None:
    """Differences of 1 +- 0.5 over four tokens: an error of sqrt(4/3) * 0.5 / 2 = 0.289."""
    best = np.zeros(4)
    nll, tokens = np.array([0.5, 1.5, 0.5, 1.5]), np.ones(4)
    error = 0.5 / math.sqrt(3)
    assert is_hopeless(nll, best, tokens, n_errors=0.99 / error)
    assert not is_hopeless(nll, best, tokens, n_errors=1.01 / error)
    assert not is_hopeless(-nll, best, tokens) and not is_hopeless(best, best, tokens)
    assert not is_hopeless(np.array([9.0]), np.zeros(1), np.ones(1))  # one example is no proof


def test_the_number_of_variables_is_small_enough_for_what_is_measured() -> None:
    assert searches.MAX_VARIABLES <= 8
