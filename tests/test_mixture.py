"""Mixture matching: redundancy by hand, the simplex problem against scipy, missing completions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from edgelora.operators.distances import measure
from edgelora.operators.embedding_distances import rbf
from edgelora.operators.mixture import (
    COLUMNS,
    GAP,
    exponent_factors,
    kernel_means,
    kernel_sums,
    match,
    mixture,
    solve,
)
from edgelora.signature import Signature, summarise

D = 24


def dataset(seed: int, tasks: list[int], n: int = 40, completions: bool = True) -> Signature:
    """`n` texts, spread evenly over `tasks`, each of which has its own centre."""
    rng = np.random.default_rng([1, seed])
    centres = np.stack([np.random.default_rng([2, t]).normal(size=D) * 3 for t in tasks])
    x = rng.normal(size=(n, D)) + np.resize(centres, (n, D)) + 20
    y = x + rng.normal(size=(n, D)) if completions else None
    return summarise(
        x.astype(np.float32),
        None if y is None else y.astype(np.float32),
        [[0]],
        n_vocab=1,
        base_id="b",
    )


def scipy_solution(gram: np.ndarray, cross: np.ndarray, rate: float) -> float:
    k = len(cross)

    def objective(w: np.ndarray) -> float:
        entropy = (w * np.log(np.maximum(w, 1e-15))).sum()
        return float(w @ gram @ w - 2 * cross @ w + rate * entropy)

    found = minimize(
        objective,
        np.full(k, 1 / k),
        bounds=[(0, 1)] * k,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 1_000},
    )
    return float(found.fun)


def test_two_adapters_by_hand() -> None:
    # w^2 + (1 - w)^2 - 2 (0.75 w + 0.25 (1 - w)): the slope 4 w - 3 is zero at w = 0.75.
    weights, gap = solve(np.eye(2), np.array([0.75, 0.25]), 0.0)
    assert weights == pytest.approx([0.75, 0.25], abs=1e-5)
    assert gap < 1e-8
    weights, _ = solve(np.eye(2), np.array([5.0, 0.0]), 0.0)
    assert weights == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.05, 1.0, 1e4])
def test_the_minimum_is_scipys(rate: float) -> None:
    rng = np.random.default_rng(3)
    for k in (1, 2, 7, 20):
        factors = rng.normal(size=(k, max(k // 2, 1))) / 3
        gram, cross = factors @ factors.T, rng.normal(size=k) / 5
        weights, gap = solve(gram, cross, rate)
        assert (weights >= 0).all() and weights.sum() == pytest.approx(1)
        value = weights @ gram @ weights - 2 * cross @ weights
        value += rate * (weights * np.log(np.maximum(weights, 1e-300))).sum()
        reference = scipy_solution(gram, cross, rate)
        assert value <= reference + 1e-6 * (1 + abs(reference))
        assert gap < GAP


def test_weights_of_no_use_vanish_where_nothing_holds_them() -> None:
    """Without lambda: 12 datasets, of which the mixture needs three, to the wanted gap."""
    rng = np.random.default_rng(4)
    points = rng.normal(size=(12, 30))
    mixed = np.array([0.5, 0.3, 0.2]) @ points[:3]
    weights, gap = solve(points @ points.T, points @ mixed, 0.0)
    assert gap < GAP
    assert weights == pytest.approx([0.5, 0.3, 0.2, *[0] * 9], abs=1e-4)


@pytest.mark.parametrize("shifts", [(0.0, 0.0), (1e9, 0.0), (0.0, 1e9), (1e5, 1e5)])
def test_kernel_sums_are_those_of_single_distances(shifts: tuple[float, float]) -> None:
    """Where all are far from the centre the product for the exponent cancels, and is not taken."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(7, 4)) + shifts[0], rng.normal(size=(COLUMNS + 30, 4)) + shifts[1]
    left, _ = exponent_factors(x, 1.7)
    _, right = exponent_factors(y, 1.7)
    found = kernel_sums(left, right, np.array([0, 3, COLUMNS + 1]))
    columns = rbf(x, y, 1.7).sum(axis=0)
    wanted = [part.sum() for part in np.split(columns, [3, COLUMNS + 1])]
    assert found == pytest.approx(wanted, rel=1e-9 if shifts[0] and shifts[1] else 1e-12)


def test_a_mixed_dataset_is_found_in_its_parts() -> None:
    bank = [dataset(seed, [seed]) for seed in range(6)]
    found = match(dataset(99, [1, 4]), bank, regularisation=1e-4)
    assert found.coefficients[[1, 4]] == pytest.approx([0.5, 0.5], abs=0.08)
    assert found.mmd < found.mmds.min() / 2
    assert mixture(dataset(99, [1, 4]), bank).argmax() in (1, 4)


def test_redundant_adapters_share_one_weight() -> None:
    """Three datasets of one task and one of another: softmin counts three, the mixture two."""
    bank = [dataset(seed, [task]) for seed, task in enumerate([0, 0, 0, 5])]
    weights = match(dataset(50, [0, 5]), bank, regularisation=1e-3).coefficients
    assert weights[:3].sum() == pytest.approx(0.5, abs=0.08)
    assert weights[:3] == pytest.approx(weights[:3].mean(), abs=0.1)


def test_kernel_means_equal_plain_sums() -> None:
    bank = [dataset(seed, [seed], n=10 + seed) for seed in range(3)]
    target = dataset(9, [1])
    gram, cross, own = kernel_means(target, bank, 0.5)
    assert np.linalg.eigvalsh(gram).min() > 0
    squares = np.diag(gram) - 2 * cross + own
    prompts = kernel_means(target, bank, 0.0)
    squares = np.diag(prompts[0]) - 2 * prompts[1] + prompts[2]
    expected = measure("rbf_mmd", target, bank, completion_weight=0.0)
    assert np.sqrt(squares) == pytest.approx(expected)


def test_unknown_completions_are_average() -> None:
    bank = [dataset(seed, [seed]) for seed in range(3)]
    bare = dataset(8, [7], completions=False)
    gram, cross, _ = kernel_means(bank[0], [*bank, bare], 1.0)
    assert gram[3, :3] == pytest.approx(gram[:3, :3].mean(axis=0))
    assert cross[3] == pytest.approx(cross[:3].mean())
    assert match(bare, bank).coefficients.shape == (3,)
    assert match(bank[0], [bare]).coefficients.tolist() == [1.0]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        match(dataset(0, [0]), [])
    with pytest.raises(ValueError, match="negative"):
        solve(np.eye(2), np.zeros(2), -1.0)
