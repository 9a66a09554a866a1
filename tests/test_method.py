"""The mathematics of docs/method.md, each statement checked with numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize
from scipy.special import logsumexp

from edgelora.operators import surrogate
from edgelora.operators.distances import measure
from edgelora.operators.heads import gibbs, softmin
from edgelora.operators.mixture import kernel_means, solve
from edgelora.operators.neural import TABLE_RANGE, NeuralHead
from edgelora.operators.surrogate import WholeHead
from edgelora.signature import Histogram, Signature, summarise

Array = NDArray[np.float64]
N_VOCAB = 64
LOG2 = float(np.log(2.0))


def dataset(seed: int, *, shift: float = 0.0, n: int = 12) -> Signature:
    """A random dataset: embeddings of prompts and completions, and token ids."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal(6)
    texts = [centre + 0.5 * rng.standard_normal((n, 6)) + shift for _ in range(2)]
    ids = [rng.integers(0, 8 * (1 + seed % 7), 9).tolist() for _ in range(n)]
    return summarise(*(t.astype(np.float32) for t in texts), ids, n_vocab=N_VOCAB, base_id="b")


BANK = [dataset(seed) for seed in range(1, 8)]


def with_ids(signature: Signature, ids: NDArray[np.int64]) -> Signature:
    found, counts = np.unique(ids, return_counts=True)
    histogram = Histogram(found.astype(np.int32), counts.astype(np.int32))
    return replace(signature, histogram=histogram, n_tokens=len(ids))


# Datasets as finitely supported measures.


@pytest.mark.parametrize("name", ["wd", "kl", "js"])
def test_a_dataset_counts_as_its_measure_alone(name: str) -> None:
    """Neither the order nor the number of its lines matters: twice the data, the same distances."""
    ids = np.random.default_rng(0).integers(0, 20, 50)
    once, twice = with_ids(BANK[0], ids), with_ids(BANK[0], np.tile(ids[::-1], 2))
    np.testing.assert_allclose(
        measure(name, once, BANK), measure(name, twice, BANK), rtol=1e-9, atol=1e-12
    )


def test_wasserstein_is_the_cheapest_transport_plan() -> None:
    """W1 of two measures on the line as the linear programme of its definition."""
    a, b = BANK[0].histogram, BANK[1].histogram
    cost = np.abs(a.ids[:, None].astype(float) - b.ids[None, :])
    rows = np.kron(np.eye(len(a.ids)), np.ones(len(b.ids)))
    columns = np.kron(np.ones(len(a.ids)), np.eye(len(b.ids)))
    masses = np.concatenate([a.counts / a.counts.sum(), b.counts / b.counts.sum()])
    found = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=masses)
    assert measure("wd", BANK[0], [BANK[1]])[0] == pytest.approx(found.fun, rel=1e-6)


# The optimal coefficients on the simplex are an entropic softmin.


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_the_softmin_is_the_minimum_on_the_simplex(temperature: float) -> None:
    costs = np.array([0.3, 1.2, 0.1, 2.0])

    def objective(w: Array) -> float:
        positive = np.maximum(w, 1e-300)
        return float(w @ costs + temperature * (w * np.log(positive)).sum())

    w = softmin(costs, temperature)
    # KKT: one multiplier for all, since every coefficient is positive.
    slopes = costs + temperature * (1.0 + np.log(np.maximum(w, 1e-300)))
    assert np.ptp(slopes[w > 1e-200]) < 1e-9
    assert objective(w) == pytest.approx(-temperature * logsumexp(-costs / temperature))
    found = minimize(
        objective, np.full(4, 0.25), bounds=[(1e-12, 1)] * 4,
        constraints={"type": "eq", "fun": lambda v: v.sum() - 1}, method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    np.testing.assert_allclose(w, found.x, atol=2e-3)


def test_gibbs_weights_are_the_same_minimum_with_measured_losses() -> None:
    losses = np.array([2.0, 1.0, 3.0])
    np.testing.assert_array_equal(gibbs(losses, temperature=0.7), softmin(losses, 0.7))


# A ReLU network approximates the coefficient map.


def relu_network(knots: Array, values: Array) -> Callable[[Array], Array]:
    """One hidden layer, a unit a knot: the piecewise linear function through the knots."""
    slopes = np.diff(values) / np.diff(knots)
    weights = np.diff(slopes, prepend=0.0)
    return lambda z: values[0] + np.maximum(z[:, None] - knots[:-1], 0.0) @ weights


def test_the_table_of_a_neural_head_is_a_relu_network() -> None:
    knots = np.linspace(-TABLE_RANGE, TABLE_RANGE, 33)
    table = np.sin(knots / 5).astype(np.float32)
    z = np.random.default_rng(0).uniform(-30, 30, 200)
    network = relu_network(knots, table.astype(float))
    np.testing.assert_allclose(NeuralHead("js", True, table)(z), network(z), atol=1e-5)


@pytest.mark.parametrize("n_units", [8, 16, 32, 64])
def test_a_relu_network_comes_as_near_to_the_coefficients_as_one_likes(n_units: int) -> None:
    """|f - net| <= max|f''| h^2 / 8, and so ||w - w_net||_1 <= that / temperature."""
    knots = np.linspace(-4, 4, n_units + 1)
    network, temperature = relu_network(knots, np.sin(knots)), 0.5
    rng = np.random.default_rng(n_units)
    bound = (8 / n_units) ** 2 / 8
    for _ in range(50):
        z = rng.uniform(-4, 4, 12)
        gap = np.abs(np.sin(z) - network(z)).max()
        away = np.abs(softmin(np.sin(z), temperature) - softmin(network(z), temperature)).sum()
        assert gap <= bound + 1e-12 and away <= gap / temperature + 1e-12


# Stability: the coefficients are Lipschitz in the dataset.


def test_coefficients_move_no_more_than_costs() -> None:
    """||w(c) - w(c')||_1 <= max |c - c'| / temperature, nearly reached by two adapters."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        k, temperature = int(rng.integers(2, 20)), 10 ** rng.uniform(-1, 1)
        costs = rng.standard_normal(k)
        other = costs + 10 ** rng.uniform(-3, 0) * rng.uniform(-1, 1, k)
        moved = np.abs(softmin(costs, temperature) - softmin(other, temperature)).sum()
        assert moved <= np.abs(costs - other).max() / temperature + 1e-12
    near = np.abs(softmin([0.0, 0.0], 1.0) - softmin([1e-3, -1e-3], 1.0)).sum()
    assert near == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("name", ["wd", "bures", "rbf_mmd", "energy"])
def test_a_metric_makes_coefficients_lipschitz_in_the_dataset(name: str) -> None:
    """By the triangle inequality: ||w(P) - w(P')||_1 <= d(P, P') / temperature."""
    rng = np.random.default_rng(3)
    for seed in range(20, 30):
        size = 10 ** rng.uniform(-2, 0.5)
        one, other = dataset(seed), dataset(seed, shift=size)
        ids = np.repeat(one.histogram.ids, one.histogram.counts).astype(np.int64)
        moved = rng.random(len(ids)) < 0.1
        other = with_ids(other, np.where(moved, rng.integers(0, N_VOCAB, len(ids)), ids))
        # All in one space: the bank's, to which the perturbed dataset belongs.
        others = [*BANK, other]
        mine, theirs = measure(name, one, others), measure(name, other, others)
        apart = mine[-1]
        assert np.abs(mine - theirs).max() <= apart + 1e-6 * (1 + apart)
        for temperature in (0.3, 3.0):
            w, v = softmin(mine[:-1], temperature), softmin(theirs[:-1], temperature)
            assert np.abs(w - v).sum() <= apart / temperature + 1e-6


def test_jensen_shannon_is_lipschitz_through_its_root() -> None:
    """sqrt(JS) is a metric of at most sqrt(log 2): |JS - JS'| <= 2 sqrt(log 2) sqrt(JS(P, P'))."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        ids = rng.integers(0, 30, 200)
        moved = np.where(rng.random(200) < 10 ** rng.uniform(-2, 0), rng.integers(0, 30, 200), ids)
        one, other = with_ids(BANK[0], ids), with_ids(BANK[0], moved)
        apart = 2 * np.sqrt(LOG2 * measure("js", one, [other])[0])
        mine, theirs = measure("js", one, BANK), measure("js", other, BANK)
        assert np.abs(mine - theirs).max() <= apart + 1e-9
        moved_by = np.abs(softmin(mine, 0.1) - softmin(theirs, 0.1)).sum()
        assert moved_by <= apart / 0.1 + 1e-9


# Averaged factors.


@pytest.mark.parametrize("n", [1, 4, 16])
def test_averaged_factors_are_mostly_cross_terms(n: int) -> None:
    """The cosine to the exact mean of n random updates is 1 / sqrt(n)."""
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((n, 120, 8)), rng.standard_normal((n, 8, 100))
    exact, averaged = np.einsum("nor,nri->oi", b, a) / n, b.mean(axis=0) @ a.mean(axis=0)
    cosine = (exact * averaged).sum() / np.linalg.norm(exact) / np.linalg.norm(averaged)
    assert cosine == pytest.approx(n**-0.5, abs=0.04)


# Mixture matching.


def test_mixture_matching_is_convex_and_stationary() -> None:
    gram, cross, _ = kernel_means(dataset(30), BANK, 0.5)
    assert np.linalg.eigvalsh(gram).min() > -1e-12
    w, _ = solve(gram, cross, 0.05)
    slopes = 2 * (gram @ w - cross) + 0.05 * np.log(w)
    assert np.ptp(slopes) < 1e-3


def test_mixture_matching_is_stable() -> None:
    """||w - w'||_1 <= 2 MMD(P, P') / lambda: entropy is strongly convex, kernel means at most 1."""
    rng = np.random.default_rng(7)
    for seed in range(30, 36):
        one, other = dataset(seed), dataset(seed, shift=10 ** rng.uniform(-2, 0))
        gram, cross, own = kernel_means(one, BANK, 0.5)
        _, cross_other, own_other = kernel_means(other, BANK, 0.5)
        _, between, _ = kernel_means(one, [*BANK, other], 0.5)
        for strength in (0.05, 0.5):
            w, v = solve(gram, cross, strength)[0], solve(gram, cross_other, strength)[0]
            bound = 2 * np.abs(cross - cross_other).max() / strength
            assert np.abs(w - v).sum() <= bound + 1e-3
        mmd = np.sqrt(max(own + own_other - 2 * between[-1], 0.0))
        assert np.abs(cross - cross_other).max() <= mmd + 0.02  # the space moves a little with it


# The surrogate.


def test_the_surrogate_is_convex() -> None:
    """Its Hessian is a mean of D^T (diag(p) - p p^T) D: positive semidefinite at any point."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((20, 5))
    moves = rng.standard_normal((4, 20, 5))
    head = rng.standard_normal((11, 5))
    targets = rng.integers(0, 11, 20)

    def loss(w: Array) -> float:
        hidden = (base + np.tensordot(w, moves, axes=1)).astype(np.float64)
        return float(surrogate.token_losses(hidden, targets, WholeHead(head)).mean())

    for _ in range(10):
        w = 2 * rng.standard_normal(4)
        logits = (base + np.tensordot(w, moves, axes=1)) @ head.T
        p = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
        along = np.einsum("ktd,vd->tvk", moves, head)  # how logits move with each coefficient
        mean = np.einsum("tv,tvk->tk", p, along)
        second = np.einsum("tv,tvk,tvl->kl", p, along, along) - mean.T @ mean
        hessian = second / 20
        assert np.linalg.eigvalsh(hessian).min() > -1e-10
        step, direction = 1e-3, rng.standard_normal(4)
        numeric = loss(w + step * direction) - 2 * loss(w) + loss(w - step * direction)
        assert numeric / step**2 == pytest.approx(direction @ hessian @ direction, rel=1e-3)
