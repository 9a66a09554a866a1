"""The best rank r of a dense matrix: by hand, then against a full SVD, on spectra of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelora.adapters import krylov
from edgelora.adapters.krylov import Best, best_of_dense
from edgelora.adapters.lowrank import dense_norm, product_distance


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of a few hundred rows go the way that those of thousands go."""
    monkeypatch.setattr(krylov, "SMALL", 8)


def with_values(values: NDArray[np.float64], n_columns: int, seed: int = 0) -> NDArray[np.float32]:
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    n = len(values)
    left = np.linalg.qr(rng.standard_normal((n, n)))[0]
    right = np.linalg.qr(rng.standard_normal((n_columns, n)))[0]
    return ((left * values) @ right.T).astype(np.float32)


def found(matrix: NDArray[np.float32], rank: int | None) -> Best:
    return best_of_dense(matrix, dense_norm(matrix), rank)


def least_error(matrix: NDArray[np.float32], rank: int) -> float:
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return float(np.linalg.norm(values[rank:]))


def test_a_diagonal_by_hand() -> None:
    """diag(3, 2, 1) at rank 2 loses the 1."""
    best = found(np.diag([3, 2, 1]).astype(np.float32), 2)
    lora_a, lora_b = best.factors
    np.testing.assert_allclose(lora_b @ lora_a, np.diag([3, 2, 0]), atol=1e-6)
    assert best.error == pytest.approx(1.0, rel=1e-6) and best.excess == 0.0


SPECTRA = {
    "flat": np.ones(384),
    "random": np.linalg.svd(np.random.default_rng(1).standard_normal((384, 500)))[1],
    "steep": np.exp(-0.1 * np.arange(384.0)),
    "slow": np.arange(1, 385.0) ** -0.5,
    "pairs": np.repeat(np.linspace(1, 0.2, 192), 2),
    "one direction and a floor": np.r_[1.0, np.full(383, 1e-2)],
    "rank 4": np.r_[4.0, 3.0, 2.0, 1.0, np.zeros(380)],
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_it_is_as_good_as_a_full_svd(name: str, turned: bool) -> None:
    matrix = with_values(SPECTRA[name], 500)
    matrix = np.ascontiguousarray(matrix.T) if turned else matrix
    for rank in (1, 8, 12):
        best, norm = found(matrix, rank), dense_norm(matrix)
        wanted = least_error(matrix, len(best.factors[0]))
        assert len(best.factors[0]) == (min(rank, 4) if name == "rank 4" else rank)
        assert best.error == pytest.approx(product_distance(matrix, best.factors), rel=1e-9)
        assert wanted - 3e-6 * norm < best.error < wanted * (1 + 1e-4) + 3e-6 * norm
        assert best.error - wanted <= best.excess + 3e-6 * norm
        assert best.excess < 1e-4 * best.error + 2e-5 * norm


@pytest.mark.usefixtures("small")
def test_factors_are_balanced_signed_and_repeatable() -> None:
    matrix = with_values(SPECTRA["slow"], 500)
    (lora_a, lora_b), again = found(matrix, 8).factors, found(matrix, 8).factors
    assert (lora_a.tobytes(), lora_b.tobytes()) == (again[0].tobytes(), again[1].tobytes())
    lengths = np.linalg.norm(lora_a, axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(lora_b, axis=0), rtol=1e-5)
    np.testing.assert_allclose(lengths**2, SPECTRA["slow"][:8], rtol=1e-5)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("decay", "rank"), [(0.1, 24), (0.05, 47)])
def test_auto_rank_keeps_99_percent_of_the_energy(decay: float, rank: int) -> None:
    values = np.exp(-decay * np.arange(2200.0))
    share = np.cumsum(values**2) / (values**2).sum()
    assert share[rank - 2] < 0.99 <= share[rank - 1]
    matrix = np.zeros((2200, 2300), np.float32)
    matrix[:200, :200] = with_values(values[:200], 200)  # the rest is below float32
    assert len(found(matrix, None).factors[0]) == rank
