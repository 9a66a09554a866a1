"""Combining: a case by hand, then dense float64 sums and full SVDs, then bad input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelora.adapters import krylov, terms
from edgelora.adapters.combine import COMBINATIONS, combine
from edgelora.adapters.lora import LoraPair
from edgelora.adapters.lora_layout import PairPlan
from edgelora.adapters.lowrank import product_norm, rank_for, reduced
from edgelora.errors import EdgeLoRAError, IncompatibleAdapter, InvalidFile, UnsupportedFile


@dataclass(frozen=True)
class Fake:
    """An adapter in memory."""

    found: Mapping[str, LoraPair]

    @property
    def plan(self) -> dict[str, PairPlan]:
        return {
            name: PairPlan(name, p.rank, p.lora_a.shape[1], p.lora_b.shape[0])
            for name, p in self.found.items()
        }

    def pair(self, name: str) -> LoraPair:
        return self.found[name]


def adapter(seed: int, *, rank: int = 4, names: Sequence[str] = "xy", scale: float = 2.0) -> Fake:
    """Random factors: x is 24 x 40, any other name 40 x 16; float16 for odd seeds."""
    rng = np.random.default_rng(seed)
    dtype = np.float16 if seed % 2 else np.float32
    pairs = {}
    for name in names:
        n_out, n_in = (24, 40) if name == "x" else (40, 16)
        lora_a = rng.standard_normal((rank, n_in)).astype(dtype)
        lora_b = rng.standard_normal((n_out, rank)).astype(dtype)
        pairs[name] = LoraPair(name, lora_a, lora_b, scale)
    return Fake(pairs)


def dense(pair: LoraPair) -> NDArray[np.float64]:
    return pair.scale * (pair.lora_b.astype(np.float64) @ pair.lora_a.astype(np.float64))


def exact(sources: Sequence[Fake], weights: Sequence[float], name: str) -> NDArray[np.float64]:
    return sum(  # type: ignore[return-value]
        w * dense(s.pair(name)) for s, w in zip(sources, weights, strict=True) if name in s.plan
    )


def relative(made: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))


def test_two_rank_one_updates_by_hand() -> None:
    """0.5 * 2 * e1 e1' - 1 * 1 * e2 e2' has singular values 1, 1: rank 1 loses half the energy."""
    first = LoraPair("x", np.float32([[1, 0]]), np.float32([[1], [0]]), 2.0)
    second = LoraPair("x", np.float32([[0, 1]]), np.float32([[0], [1]]), 1.0)
    sources = [Fake({"x": first}), Fake({"x": second})]
    whole = combine("svd", sources, [0.5, -1.0], rank=2)
    (pair,) = whole.pairs()
    np.testing.assert_allclose(dense(pair), [[1, 0], [0, -1]], atol=1e-7)
    assert whole.error == pytest.approx(0, abs=1e-7)
    halved = combine("svd", sources, [0.5, -1.0], rank=1)
    assert halved.error == pytest.approx(0.5**0.5)
    assert halved.reports[0].norm == pytest.approx(2**0.5)


def test_factor_averaging_by_hand() -> None:
    """linear makes 2 * (0.5 + 0.5)' (0.5, 0.5): cross terms that the exact sum does not have."""
    first = LoraPair("x", np.float32([[1, 0]]), np.float32([[1], [0]]), 2.0)
    second = LoraPair("x", np.float32([[0, 1]]), np.float32([[0], [1]]), 2.0)
    made = combine("linear", [Fake({"x": first}), Fake({"x": second})], [0.5, 0.5])
    (pair,) = made.pairs()
    np.testing.assert_allclose(dense(pair), [[0.5, 0.5], [0.5, 0.5]], atol=1e-7)
    assert made.error == pytest.approx(1 / 2**0.5)


@pytest.mark.parametrize("weights", [[0.7, -0.3, 1.5], [1.0, 0.0, 0.0], [1e-3, 2e3, 1.0]])
@pytest.mark.parametrize("method", ["svd", "cat"])
def test_sums_equal_the_dense_float64_sum(method: str, weights: list[float]) -> None:
    """Different ranks, scales, dtypes and modules; svd at full rank and cat are exact."""
    sources = [
        adapter(1, rank=3, scale=0.5),
        adapter(2, rank=5, names="xz"),
        adapter(3, rank=8, names="yz", scale=4.0),
    ]
    rank = 16 if method == "svd" else "auto"
    made = combine(method, sources, weights, rank=rank, scale=1.5)
    pairs = {pair.name: pair for pair in made.pairs()}
    assert list(pairs) == [p.name for p in made.plan]
    for planned in made.plan:
        pair = pairs[planned.name]
        assert (pair.rank, pair.scale) == (planned.rank, 1.0)
        wanted = 1.5 * exact(sources, weights, planned.name)
        assert relative(dense(pair), wanted) < 2e-6
    assert made.error < 2e-6


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_svd_is_the_best_of_its_rank(rank: int) -> None:
    """Its error equals the tail of a full float64 SVD, and the reported error is the real one."""
    sources = [adapter(seed) for seed in range(4)]
    weights = [0.5, -0.2, 1.0, 0.3]
    made = combine("svd", sources, weights, rank=rank)
    lost, total = 0.0, 0.0
    for report, pair in zip(made.reports, made.pairs(), strict=True):
        wanted = exact(sources, weights, report.name)
        values = np.linalg.svd(wanted, compute_uv=False)
        best = float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))
        assert report.error == pytest.approx(best, rel=1e-4)
        assert relative(dense(pair), wanted) == pytest.approx(best, rel=1e-4)
        lost += float((values[rank:] ** 2).sum())
        total += float((values**2).sum())
    assert made.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_more_stacked_rank_than_the_matrix_has() -> None:
    """30 x rank 4 on matrices of 24 x 40 and 40 x 16."""
    sources = [adapter(seed) for seed in range(30)]
    made = combine("svd", sources, [1 / 30] * 30, rank=64)
    for pair in made.pairs():
        assert pair.rank == (24 if pair.name == "x" else 16)
        assert relative(dense(pair), exact(sources, [1 / 30] * 30, pair.name)) < 5e-6


@pytest.mark.parametrize("rank", [1, 5])
def test_a_wide_stack_on_a_large_matrix(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 x rank 4 on 300 x 260, chunks of 16 ranks, by Krylov spaces: the optimum within 1e-4."""
    monkeypatch.setattr(krylov, "SMALL", 8)
    monkeypatch.setattr(terms, "CHUNK_RANK", 16)
    sources = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        lora_a = rng.standard_normal((4, 260), dtype=np.float32)
        lora_b = rng.standard_normal((300, 4)).astype(np.float16)
        sources.append(Fake({"x": LoraPair("x", lora_a, lora_b, 0.1 + seed % 7)}))
    weights = np.random.default_rng(0).uniform(-1, 1, (40, 4))
    made = combine("svd", sources, {"x": weights}, rank=rank)
    wanted = sum(
        s.pair("x").scale * (s.pair("x").lora_b * row) @ s.pair("x").lora_a.astype(np.float64)
        for s, row in zip(sources, weights, strict=True)
    )
    values = np.linalg.svd(wanted, compute_uv=False)
    best = float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))
    (pair,) = made.pairs()
    assert relative(dense(pair), wanted) == pytest.approx(best, rel=1e-4)
    assert made.error == pytest.approx(relative(dense(pair), wanted), rel=1e-5)
    assert made.error - best <= made.excess + 1e-6 and made.excess < 1e-4 * best
    assert made.reports[0].norm == pytest.approx(np.linalg.norm(wanted), rel=1e-5)


@pytest.mark.parametrize("k", [2, 30])
@pytest.mark.parametrize("method", COMBINATIONS)
def test_an_adapter_that_was_never_trained_adds_nothing(method: str, k: int) -> None:
    """lora_b begins as zeros."""
    untrained = adapter(2, names="x")
    untrained.pair("x").lora_b[:] = 0
    with pytest.raises(EdgeLoRAError, match="zero everywhere"):
        combine(method, [untrained] * k, [1.0] * k)


@pytest.mark.parametrize("method", COMBINATIONS)
def test_a_wide_stack_that_cancels_or_is_broken(method: str) -> None:
    """30 x rank 4 is worked on as a dense sum; linear's error is that of its own factors."""
    sources = [adapter(seed, names="x") for seed in range(15)] * 2
    weights = [1.0] * 15 + [-1.0] * 15
    with pytest.raises(EdgeLoRAError, match="zero everywhere"):
        combine(method, sources, weights)
    made = combine(method, sources, [1 / 30] * 30)
    (pair,) = made.pairs()
    wanted = exact(sources, [1 / 30] * 30, "x")
    assert made.error == pytest.approx(relative(dense(pair), wanted), rel=1e-4, abs=1e-5)
    whole = sources[3].pair("x")
    for value in (np.nan, 1e20, 1e30):
        lora_a = np.array(whole.lora_a, np.float32)
        lora_a[0, 0] = value
        sources[3] = Fake({"x": LoraPair("x", lora_a, whole.lora_b, whole.scale)})
        with pytest.raises(InvalidFile, match="x: an adapter holds NaN or infinite"):
            combine(method, sources, [1 / 30] * 30)


def test_auto_rank_keeps_99_percent_of_the_energy() -> None:
    sources = [adapter(seed) for seed in range(3)]
    made = combine("svd", sources, [1.0, 0.1, 0.01])
    for report in made.reports:
        values = np.linalg.svd(exact(sources, [1.0, 0.1, 0.01], report.name), compute_uv=False)
        share = np.cumsum(values**2) / (values**2).sum()
        assert share[report.rank - 1] >= 0.99 > share[report.rank - 2]
    assert rank_for(np.ones(200), None) == 64


def test_factors_are_balanced_signed_and_repeatable() -> None:
    rng = np.random.default_rng(0)
    lora_b = rng.standard_normal((30, 9), dtype=np.float32) * 100
    lora_a = rng.standard_normal((9, 20), dtype=np.float32)
    low, again = reduced(lora_b, lora_a, 5), reduced(lora_b, lora_a, 5)
    (new_a, new_b), (again_a, again_b) = low.factors, again.factors
    assert new_a.dtype == new_b.dtype == np.float32
    assert (new_a.tobytes(), new_b.tobytes()) == (again_a.tobytes(), again_b.tobytes())
    np.testing.assert_allclose(
        np.linalg.norm(new_a, axis=1), np.linalg.norm(new_b, axis=0), rtol=1e-5
    )
    values = np.linalg.svd(lora_b.astype(float) @ lora_a, compute_uv=False)
    np.testing.assert_allclose((new_b**2).sum(axis=0), values[:5], rtol=1e-5)
    assert low.norm == pytest.approx(np.linalg.norm(values), rel=1e-6)
    assert low.error == pytest.approx(np.linalg.norm(values[5:]), rel=1e-5)
    assert product_norm(lora_b, lora_a) == pytest.approx(np.linalg.norm(values), rel=1e-6)


def test_a_core_of_which_only_the_leading_part_is_computed() -> None:
    """160 ranks of which 12 are wanted: as by a full SVD."""
    rng = np.random.default_rng(0)
    lora_b = rng.standard_normal((300, 160), dtype=np.float32) * np.geomspace(1, 1e-3, 160)
    lora_a = rng.standard_normal((160, 200), dtype=np.float32)
    product = lora_b.astype(float) @ lora_a
    values = np.linalg.svd(product, compute_uv=False)
    low = reduced(lora_b.astype(np.float32), lora_a, 12)
    best = float(np.linalg.norm(values[12:]))
    assert low.error == pytest.approx(best, rel=1e-5)
    made = low.factors[1].astype(float) @ low.factors[0]
    assert np.linalg.norm(made - product) == pytest.approx(best, rel=1e-5)


def test_weights_for_each_tensor() -> None:
    sources = [adapter(1), adapter(2)]
    made = combine("cat", sources, {"x": [1.0, 0.0], "y": [0.5, -2.0]})
    x, y = made.pairs()
    assert relative(dense(x), dense(sources[0].pair("x"))) < 1e-6
    assert x.rank == 4
    assert relative(dense(y), exact(sources, [0.5, -2.0], "y")) < 1e-6


def test_linear_is_the_papers_average_of_flattened_factors() -> None:
    sources = [adapter(seed) for seed in (2, 4, 6)]
    weights = np.array([0.2, 0.5, 0.3])
    for pair in combine("linear", sources, weights.tolist()).pairs():
        averaged_a = np.tensordot(weights, [s.pair(pair.name).lora_a for s in sources], axes=1)
        averaged_b = np.tensordot(weights, [s.pair(pair.name).lora_b for s in sources], axes=1)
        assert relative(dense(pair), 2.0 * averaged_b @ averaged_a) < 1e-6


@pytest.mark.parametrize("share", [0.5, 1e-6])
def test_the_error_of_linear_is_that_of_what_it_made(share: float) -> None:
    """From Gram matrices or from the dense sum; other scales, a coefficient for each component."""
    sources = [adapter(2, scale=2.0), adapter(5, scale=0.7)]
    rows = np.array([[1.0, -0.5, 2.0, 0.0], [share, 0.3, -share, 1.0]])
    made = combine("linear", sources, {"x": rows, "y": rows * share}, scale=1.5)
    for pair, report in zip(made.pairs(), made.reports, strict=True):
        row = rows * (share if report.name == "y" else 1.0)
        terms = []
        for source, weights in zip(sources, row, strict=True):
            one = source.pair(report.name)
            terms.append(dense(LoraPair("", weights[:, None] * one.lora_a, one.lora_b, one.scale)))
        wanted = 1.5 * sum(terms)
        assert report.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-5)
        assert report.error == pytest.approx(relative(dense(pair), wanted), rel=1e-5)


def test_what_cancels_is_left_out_and_named() -> None:
    same = adapter(1)
    partly = combine("svd", [same, same, adapter(2, names="x")], [1.0, -1.0, 0.5])
    assert [p.name for p in partly.plan] == ["x"]
    assert partly.cancelled == ("y",)
    assert partly.plan[0].rank <= 4
    for method in COMBINATIONS:
        with pytest.raises(EdgeLoRAError, match="zero everywhere"):
            combine(method, [same, same], [1.0, -1.0])
        with pytest.raises(EdgeLoRAError, match="zero everywhere"):
            combine(method, [same], [1.0], scale=0.0)


def test_the_same_adapter_twice_has_its_own_rank() -> None:
    made = combine("svd", [adapter(1), adapter(1)], [0.5, 0.5], rank=64)
    assert {p.rank for p in made.plan} == {4}


@pytest.mark.parametrize(
    ("method", "coefficients", "options", "message"),
    [
        ("ties", [1.0, 1.0], {}, "no combination 'ties'"),
        ("svd", [1.0], {}, "1 coefficients for 2 adapters"),
        ("svd", [1.0, float("nan")], {}, "not a finite number"),
        ("svd", [1.0, 1.0], {"scale": float("inf")}, "scale inf"),
        ("svd", [1.0, 1.0], {"rank": 0}, "rank 0"),
        ("svd", [1.0, 1.0], {"rank": "half"}, "rank 'half'"),
        ("cat", [1.0, 1.0], {"rank": 8}, "cat takes no rank"),
        ("svd", {"x": [1.0, 1.0]}, {}, "y: no coefficients"),
        ("svd", {"x": [1.0, 1.0], "y": [1, 1], "q": [1, 1]}, {}, "q: no source adapts it"),
    ],
)
def test_unusable_arguments(
    method: str, coefficients: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(EdgeLoRAError, match=message):
        combine(method, [adapter(1), adapter(2)], coefficients, **options)  # type: ignore[arg-type]


def test_adapters_that_do_not_go_together() -> None:
    other = Fake({"x": LoraPair("x", np.ones((4, 40), "f4"), np.ones((25, 4), "f4"), 1.0)})
    with pytest.raises(IncompatibleAdapter, match="x: 24 x 40 and 25 x 40"):
        combine("svd", [adapter(1), other], [1.0, 1.0])
    combine("svd", [adapter(1), other], [1.0, 0.0])
    with pytest.raises(UnsupportedFile, match="ranks 4, 2"):
        combine("linear", [adapter(1), adapter(2, rank=2)], [1.0, 1.0])


@pytest.mark.parametrize("method", ["svd", "cat"])
@pytest.mark.parametrize("value", [np.inf, np.nan, 1e20])
def test_values_that_no_norm_can_be_computed_of(method: str, value: float) -> None:
    """Their tensor is not taken for one whose updates cancelled out."""
    broken = adapter(2)
    broken.pair("y").lora_a[0, 0] = value
    with pytest.raises(InvalidFile, match="y: an adapter holds NaN or infinite"):
        combine(method, [broken], [1.0])
