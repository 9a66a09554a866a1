"""Heads: by hand, the paper's heads typed anew, tiny temperatures, infinities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from edgelora.operators.heads import (
    OPERATORS,
    PAPER_TEMPERATURE,
    attentional,
    calibrated_temperature,
    gibbs,
    nearest,
    normalized,
    softmin,
    top_k,
    uniform,
    z_scores,
)
from edgelora.operators.neural import NeuralHead

COSTS = np.array([3.0, 1.0, 2.0, 7.0, 1.5])
HEAD = NeuralHead("js", True, np.linspace(-32, 32, 65, dtype=np.float32))  # the identity


def apply(name: str, costs: np.ndarray, **arguments: object) -> np.ndarray:
    if name == "neural":
        arguments["head"] = HEAD
    return OPERATORS[name](costs, **arguments)


def test_by_hand() -> None:
    assert softmin([0.0, math.log(3.0)], 1.0) == pytest.approx([0.75, 0.25])
    assert softmin([0.0, 2 * math.log(3.0)], 2.0) == pytest.approx([0.75, 0.25])
    assert uniform([5.0, 1.0]).tolist() == [0.5, 0.5]
    assert nearest([2.0, 1.0, 1.0]).tolist() == [0.0, 1.0, 0.0]
    assert top_k([3.0, 1.0, 2.0], count=2).tolist() == [0.0, 0.5, 0.5]
    assert top_k([9.0, 0.0, math.log(3.0)], count=2, temperature=1.0) == pytest.approx(
        [0, 0.75, 0.25]
    )
    # Mean 2 and deviation 1; with the diagonal (1, 3, 0): mean 4/3.
    assert z_scores([1.0, 3.0], diagonal=False).tolist() == [-1.0, 1.0]
    assert z_scores([1.0, 3.0], diagonal=True) == pytest.approx(
        (np.array([1, 3]) - 4 / 3) / np.std([0, 1, 3])
    )


def test_the_papers_heads_on_a_leave_one_out_matrix() -> None:
    """Their code z-scores each row with its diagonal 0, and puts infinity there for softmin."""
    rng = np.random.default_rng(0)
    matrix = rng.uniform(0.1, 2, size=(6, 6))
    np.fill_diagonal(matrix, 0.0)
    for row in range(6):
        others = np.delete(matrix[row], row)
        scaled = (matrix[row] - matrix[row].mean()) / matrix[row].std()
        scaled[row] = np.inf
        expected = np.exp(-scaled) / np.exp(-scaled).sum()
        assert normalized(others) == pytest.approx(np.delete(expected, row))
        plain = np.exp(-others) / np.exp(-others).sum()
        assert attentional(others, temperature=PAPER_TEMPERATURE) == pytest.approx(plain)
        fixed = (others - others.mean()) / others.std()
        expected = np.exp(-fixed) / np.exp(-fixed).sum()
        assert OPERATORS["normalized_fixed"](others) == pytest.approx(expected)
        # A head that is the identity makes neural the normalized head.
        assert apply("neural", others) == pytest.approx(normalized(others), rel=1e-5)


def test_softmin_solves_the_papers_problem() -> None:
    """argmin <w, c> + lambda sum w log w on the simplex, by scipy."""
    rate = 0.7

    def objective(w: np.ndarray) -> float:
        return float(w @ COSTS + rate * (w * np.log(np.maximum(w, 1e-12))).sum())

    solution = minimize(
        objective,
        np.full(5, 0.2),
        bounds=[(1e-9, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert softmin(COSTS, rate) == pytest.approx(solution.x, abs=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "costs", [[1.0], [2.0, 2.0], [0.1, 5.0, np.inf], [1e-300, 1e300], [0.3, 0.1, 0.1, 0.7]]
)
def test_always_on_the_simplex(name: str, costs: list[float]) -> None:
    temperatures = [{}]
    if name not in ("uniform", "nearest"):
        temperatures += [{"temperature": t} for t in (5e-324, 1e-12, 1.0, 1e300)]
    for arguments in temperatures:
        with np.errstate(over="ignore"):
            weights = apply(name, np.array(costs), **arguments)
        assert weights.dtype == np.float64 and weights.shape == (len(costs),)
        assert (weights >= 0).all() and weights.sum() == pytest.approx(1.0), arguments
        assert (weights[np.isinf(costs)] == 0).all()


@pytest.mark.parametrize("name", sorted(OPERATORS.keys() - {"uniform"}))
def test_nearer_never_weighs_less(name: str) -> None:
    weights = apply(name, COSTS)
    assert (np.diff(weights[np.argsort(COSTS)]) <= 1e-12).all()
    assert weights[1] == weights.max()


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_calibrated_temperature_gives_the_wanted_breadth(scale: float) -> None:
    for wanted in (1.5, 2.5, 4.0):
        temperature = calibrated_temperature(COSTS * scale, wanted)
        weights = softmin(COSTS * scale, temperature)
        assert np.exp(-(weights * np.log(weights)).sum()) == pytest.approx(wanted, rel=1e-6)
    assert calibrated_temperature([2.0, 2.0]) == 1.0
    assert attentional(COSTS * scale) == pytest.approx(attentional(COSTS), rel=1e-6)


def test_gibbs_is_free_of_units_and_ignores_failures() -> None:
    losses = np.array([1.0, 1.2, 1.4, 9.0])
    # Median 1.3, least 1.0: temperature 0.075.
    assert gibbs(losses) == pytest.approx(softmin(losses, 0.075))
    assert gibbs(losses * 10 + 3) == pytest.approx(gibbs(losses))
    assert gibbs([1.0, 1.0, 1.0, 5.0]).tolist() == [1 / 3, 1 / 3, 1 / 3, 0.0]
    assert gibbs([2.0, np.inf]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("costs", [[], [np.inf], [np.nan, 1.0], [-np.inf, 1.0], [[1.0, 2.0]]])
@pytest.mark.parametrize("name", OPERATORS)
def test_costs_that_mean_nothing_are_refused(name: str, costs: list) -> None:
    with pytest.raises(ValueError, match="cost"):
        apply(name, np.array(costs))


def test_wrong_arguments_are_refused() -> None:
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            softmin([1.0], temperature)
    with pytest.raises(ValueError, match="count"):
        top_k([1.0], count=0)
