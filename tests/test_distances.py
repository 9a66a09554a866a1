"""Distances on token ids: by hand, then the paper's formulas typed anew on expanded ids."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from edgelora.errors import IncompatibleAdapter
from edgelora.operators.distances import (
    DISTANCES,
    TOKEN_DISTANCES,
    measure,
    multiscale_mmd,
    split_by_signature,
)
from edgelora.signature import Signature, summarise

N_VOCAB = 32_000


def of(ids: list[int], n_vocab: int = N_VOCAB, **changes: object) -> Signature:
    arguments: dict = {"n_vocab": n_vocab, "base_id": "b"}
    arguments.update(changes)
    d = arguments.pop("d", 2)
    return summarise(np.ones((1, d), np.float32), None, [ids], **arguments)


def random_ids(seed: int, n: int = 3_000) -> list[int]:
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.2, size=n) * (seed + 1), N_VOCAB - 1)
    return [*ids.tolist(), N_VOCAB - 2, N_VOCAB - 1, 0]


def paper_density(ids: list[int], bins: np.ndarray) -> np.ndarray:
    density, _ = np.histogram(ids, bins=bins, density=True)
    return density + 1e-10


PAPER_BINS = np.arange(0, N_VOCAB)  # 32,000 edges: 31,999 bins
FIXED_BINS = np.arange(0, N_VOCAB + 1)


def paper_kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)))


def paper_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """As published, with float32 squared distances, on all pairs of drawn ids."""
    total = 0.0
    for a, b, weight in ((x, x, 1.0), (y, y, 1.0), (x, y, -2.0)):
        sums = ((a**2)[:, None] + (b**2)[None, :]).astype(np.float32)
        gaps = sums - 2 * np.outer(a, b).astype(np.float32)
        for width in (0.2, 0.5, 0.9, 1.3):
            total += weight * float(np.mean(width**2 / (width**2 + gaps), dtype=np.float64))
    return total


def test_by_hand() -> None:
    # One id moves from 1 to 3; densities (1, 0) and (0, 1) have JS = log 2.
    a, b = of([1, 1], 10), of([3, 3], 10)
    assert measure("wd", a, [b, a]).tolist() == [2.0, 0.0]
    assert measure("js", a, [b]) == pytest.approx(np.log(2), abs=1e-8)
    assert measure("kl", a, [b]) == pytest.approx(np.log(1e10), rel=1e-8)
    # All drawn ids are equal: the kernels are 4, 4 and sum a^2 / (a^2 + 4).
    across = sum(x**2 / (x**2 + 4) for x in (0.2, 0.5, 0.9, 1.3))
    assert measure("mmd", a, [b]) == pytest.approx(8 - 2 * across, rel=1e-5)


def test_the_last_two_ids_share_a_bin_unless_fixed() -> None:
    a, b = of([8], 10), of([9], 10)
    assert measure("js", a, [b]).tolist() == measure("kl", a, [b]).tolist() == [0.0]
    assert measure("js_fixed", a, [b])[0] > 0.6
    assert measure("kl_fixed", a, [b])[0] > 20


def test_wd_equals_scipys_on_expanded_ids() -> None:
    ids = [random_ids(seed) for seed in range(4)]
    expected = [wasserstein_distance(ids[0], other) for other in ids[1:]]
    assert measure("wd", of(ids[0]), [of(other) for other in ids[1:]]) == pytest.approx(expected)


@pytest.mark.parametrize(("suffix", "bins"), [("", PAPER_BINS), ("_fixed", FIXED_BINS)])
def test_kl_and_js_equal_the_papers_on_expanded_ids(suffix: str, bins: np.ndarray) -> None:
    ids = [random_ids(seed) for seed in range(3)]
    p, *others = (paper_density(some, bins) for some in ids)
    signatures = [of(some) for some in ids]
    kl = measure(f"kl{suffix}", signatures[0], signatures[1:])
    js = measure(f"js{suffix}", signatures[0], signatures[1:])
    assert kl == pytest.approx([paper_kl(p, q) for q in others], rel=1e-10)
    middles = [(p + q) / 2 for q in others]
    expected = [
        0.5 * paper_kl(p, m) + 0.5 * paper_kl(q, m) for q, m in zip(others, middles, strict=True)
    ]
    assert js == pytest.approx(expected, rel=1e-10)


def test_kl_is_of_the_new_dataset_from_the_bank() -> None:
    p, q = of([1, 1, 1, 2], 10), of([1, 2, 2, 3], 10)
    forward = 0.75 * np.log(3) + 0.25 * np.log(0.5)
    assert measure("kl", p, [q]) == pytest.approx(forward, abs=1e-6)


def test_mmd_equals_the_papers_on_the_same_draw() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.choice(random_ids(seed), 1_000) for seed in (1, 2))
    assert multiscale_mmd(x, y) == pytest.approx(paper_mmd(x, y), abs=2e-6)


def test_mmd_is_seeded_and_independent_of_the_rest_of_the_bank() -> None:
    a, b, c = (of(random_ids(seed)) for seed in range(3))
    pair = measure("mmd", a, [b, c], seed=1)
    assert measure("mmd", a, [c], seed=1)[0] == pair[1]
    assert measure("mmd", a, [c], seed=2)[0] != pair[1]


def test_mmd_draws_from_the_token_distribution() -> None:
    near, far = of([5] * 9 + [6], 10), of([6] * 9 + [5], 10)
    x, y = np.repeat([5, 6], [900, 100]), np.repeat([5, 6], [100, 900])
    assert measure("mmd", near, [far]) == pytest.approx(paper_mmd(x, y), rel=0.1)


def test_signatures_of_another_base_are_refused_all_at_once() -> None:
    a = of([1])
    with pytest.raises(IncompatibleAdapter) as caught:
        measure("js", a, [of([1], base_id="other"), a, of([1], n_vocab=5), of([1], d=3)])
    assert len(caught.value.problems) == 3


def test_a_signature_without_tokens_is_refused_by_token_distances_only() -> None:
    empty, a = of([]), of([1])
    assert set(TOKEN_DISTANCES) == {
        f"{n}{s}" for n in ("wd", "kl", "js", "mmd") for s in ("", "_fixed")
    }
    for name in TOKEN_DISTANCES:
        with pytest.raises(IncompatibleAdapter, match="counts tokens"):
            measure(name, a, [empty])
    for name in DISTANCES.keys() - TOKEN_DISTANCES:
        assert measure(name, a, [empty]).shape == (1,)


def test_which_adapters_are_skipped() -> None:
    assert split_by_signature([None, of([1]), None]) == ([1], [0, 2])
