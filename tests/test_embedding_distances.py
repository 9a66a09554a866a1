"""Distances on embeddings: by hand, and against POT and plain numpy in the whitened space."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import block_diag

from edgelora.errors import IncompatibleAdapter
from edgelora.operators.distances import DISTANCES, TOKEN_DISTANCES, measure, prepare
from edgelora.operators.embedding_distances import bures_squared, fields_used
from edgelora.operators.whitening import SHRINKAGE, moment_space, sample_space
from edgelora.signature import Signature, summarise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ot

D = 40
EMBEDDING = sorted(DISTANCES.keys() - TOKEN_DISTANCES)


def dataset(seed: int, task: int, n: int = 30, completions: bool = True) -> Signature:
    """A sample of one task: its own mean, unequal variances, one large common offset."""
    rng = np.random.default_rng([1, seed])
    scale = np.geomspace(8, 0.5, D)
    centres = np.random.default_rng([2, task]).normal(size=(2, D)) * 2
    x = (rng.normal(size=(n, D)) + centres[0]) * scale + 50
    y = rng.normal(size=(n, D)) + centres[1]
    return summarise(
        x.astype(np.float32),
        y.astype(np.float32) if completions else None,
        [[1]],
        n_vocab=2,
        base_id="b",
    )


BANK = [dataset(seed, task=seed) for seed in range(5)]


@pytest.mark.parametrize("name", EMBEDDING)
def test_the_nearest_dataset_is_found(name: str) -> None:
    target = dataset(77, task=2)
    distances = measure(name, target, BANK)
    assert distances.shape == (5,) and distances.dtype == np.float64
    assert distances.argmin() == 2
    assert (distances >= 0).all()


@pytest.mark.parametrize("name", EMBEDDING)
def test_a_dataset_is_at_distance_zero_from_itself_and_results_repeat(name: str) -> None:
    distances = measure(name, BANK[3], BANK, seed=4)
    assert distances[3] == pytest.approx(0, abs=1e-6)
    assert np.array_equal(distances, measure(name, BANK[3], BANK, seed=4))


@pytest.mark.parametrize("name", EMBEDDING)
def test_fields_without_completions(name: str) -> None:
    bare = dataset(9, task=2, completions=False)
    assert fields_used(bare, BANK) == fields_used(BANK[0], [bare]) == ("prompt",)
    assert fields_used(BANK[0], [bare, BANK[1]]) == ("prompt", "completion")
    prompts_only = measure(name, BANK[2], BANK, completion_weight=0.0)
    assert measure(name, bare, BANK).argmin() == 2
    # An adapter without completions is taken to be averagely far in them.
    both = measure(name, BANK[2], [bare, *BANK], completion_weight=1.0)
    assert both[0] == pytest.approx(both[1:].mean())
    assert prompts_only[2] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", EMBEDDING)
def test_one_adapter_of_one_text(name: str) -> None:
    x = np.ones((1, 4), np.float32)
    one = summarise(x, None, [[0]], n_vocab=1, base_id="b")
    other = summarise(2 * x, None, [[0]], n_vocab=1, base_id="b")
    assert np.isfinite(measure(name, other, [one])).all()


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_a_prepared_bank_measures_the_same(name: str) -> None:
    """For several datasets, one without completions; some adapters have none either."""
    bank = [*BANK, dataset(8, task=8, completions=False), dataset(9, task=9, n=1)]
    compare = prepare(name, bank, seed=4)
    for target in (dataset(77, task=2), dataset(78, task=1, completions=False)):
        assert np.array_equal(compare(target), measure(name, target, bank, seed=4))


@pytest.mark.parametrize("name", ["bures", "rbf_mmd"])
def test_a_prepared_bank_is_of_one_base(name: str) -> None:
    other = replace(dataset(1, task=1), base_id="c")
    with pytest.raises(IncompatibleAdapter, match="signature 0: base b"):
        prepare(name, BANK)(other)


def test_cosine_is_that_of_the_whitened_means() -> None:
    target = dataset(77, task=2)
    space = moment_space([other.prompt for other in BANK])
    x = space.mean(target.prompt)
    means = [space.mean(other.prompt) for other in BANK]
    wanted = [1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in means]
    found = measure("cosine", target, BANK, completion_weight=0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_bures_by_hand() -> None:
    # Commuting covariances diag(9, 1) and diag(4, 1): (3 - 2)^2 + 0.
    a, b = np.diag([3.0, 1.0]), np.diag([2.0, 1.0])
    assert bures_squared(a, b) == pytest.approx(1.0)
    assert bures_squared(a, np.zeros((0, 2))) == pytest.approx(10.0)


def test_bures_equals_pots_with_the_residual_as_a_block() -> None:
    target = BANK[0]
    fields = [signature.prompt for signature in BANK]
    space = moment_space(fields)
    expected = []
    for field in fields:
        covariances = []
        for some in (target.prompt, field):
            factor, residual = space.factor(some), space.residual_deviation(some) ** 2
            block = residual / 3 * np.eye(3)
            covariances.append(block_diag(factor.T @ factor + 1e-6 * np.eye(D), block))
        means = [np.append(space.mean(some), np.zeros(3)) for some in (target.prompt, field)]
        expected.append(float(ot.gaussian.bures_wasserstein_distance(*means, *covariances)))
    found = measure("bures", target, BANK, completion_weight=0.0)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-4)


def points_of(signatures: list[Signature]) -> list[np.ndarray]:
    fields = [signature.prompt for signature in signatures]
    space = sample_space(fields)
    return [space.points(field) for field in fields]


def test_sliced_equals_pots() -> None:
    x, *others = points_of(BANK)
    expected = [ot.sliced_wasserstein_distance(x, y, n_projections=64, seed=3) for y in others]
    found = measure("sliced", BANK[0], BANK, seed=3, completion_weight=0.0)
    assert found[1:] == pytest.approx(expected)


def test_sinkhorn_equals_pots_divergence() -> None:
    fields = [signature.prompt for signature in BANK]
    reg = 0.5 * sample_space(fields).median_squared
    x, *others = points_of(BANK)

    def cost(a: np.ndarray, b: np.ndarray) -> float:
        matrix = ot.dist(a, b)
        plan = ot.sinkhorn(ot.unif(len(a)), ot.unif(len(b)), matrix, reg, numItermax=9_000)
        return float((plan * matrix).sum())

    expected = [cost(x, y) - cost(x, x) / 2 - cost(y, y) / 2 for y in others]
    found = measure("sinkhorn", BANK[0], BANK, completion_weight=0.0)
    assert found[1:] == pytest.approx(expected, rel=1e-3)


def test_energy_equals_its_definition() -> None:
    x, *others = points_of(BANK)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.linalg.norm(p - q) for q in b] for p in a]))

    expected = [np.sqrt(2 * mean(x, y) - mean(x, x) - mean(y, y)) for y in others[:2]]
    assert measure("energy", BANK[0], BANK, completion_weight=0.0)[1:3] == pytest.approx(expected)


def test_rbf_mmd_equals_its_definition() -> None:
    fields = [signature.prompt for signature in BANK]
    h = sample_space(fields).median_squared
    x, y = points_of(BANK)[:2]

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        squares = ((a[:, None] - b[None]) ** 2).sum(axis=2)
        return float(np.mean([np.exp(-squares / (c * h)) for c in (4, 2, 1)]))

    expected = np.sqrt(mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert measure("rbf_mmd", BANK[0], BANK, completion_weight=0.0)[1] == pytest.approx(expected)


def test_whitening_equals_the_inverse_root_of_the_shrunk_covariance() -> None:
    fields = [signature.prompt for signature in BANK]
    space = moment_space(fields)
    means = np.stack([field.mean for field in fields]).astype(np.float64)
    total = np.cov(means, rowvar=False, ddof=0)
    for field in fields:
        factor = field.factor()
        total += (factor.T @ factor + field.residual_variance / D * np.eye(D)) / len(fields)
    shrunk = (1 - SHRINKAGE) * total + SHRINKAGE * np.trace(total) / D * np.eye(D)
    values, vectors = np.linalg.eigh(shrunk)
    expected = vectors @ np.diag(values**-0.5) @ vectors.T
    assert space.whiten(np.eye(D)) == pytest.approx(expected, abs=1e-6)


def test_distances_do_not_depend_on_a_common_offset() -> None:
    rng = np.random.default_rng(5)
    sets = [rng.normal(size=(20, D)) + i for i in range(4)]

    def signatures(offset: float) -> list[Signature]:
        shifted = [(x + offset).astype(np.float32) for x in sets]
        return [summarise(x, None, [[0]], n_vocab=1, base_id="b") for x in shifted]

    for name in EMBEDDING:
        plain, moved = (measure(name, s[0], s[1:]) for s in (signatures(0), signatures(500)))
        assert moved == pytest.approx(plain, rel=0.02), name
