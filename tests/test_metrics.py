"""Metrics: hand cases, a plain longest common subsequence, scipy's bootstrap."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from scipy.stats import bootstrap

from edgelora.errors import EdgeLoRAError
from edgelora.metrics import _rouge_scorer, exact_match, paired_bootstrap, recovered_share, rouge_l


def test_rouge_l_by_hand() -> None:
    # LCS("the cat", "the cat sat") = 2: precision 1, recall 2/3.
    assert rouge_l("the cat", ["the cat sat"]) == pytest.approx(0.8)
    assert rouge_l("the cat", ["a dog", "the cat sat", "cat"]) == pytest.approx(0.8)
    assert rouge_l("running", ["run"]) == 1.0  # the stemmer
    assert rouge_l("", ["run"]) == 0.0


def lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return lcs(a[:-1], b[:-1]) + 1
    return max(lcs(a[:-1], b), lcs(a, b[:-1]))


def test_rouge_l_equals_a_plain_lcs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (list(rng.choice(["ab", "cd", "ef"], size=5)) for _ in range(2))
        common = lcs(a, b)
        assert rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(common / 5)


def test_rouge_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    _rouge_scorer.cache_clear()
    with pytest.raises(EdgeLoRAError, match=r"edgelora\[eval\]"):
        rouge_l("a", ["a"])
    _rouge_scorer.cache_clear()


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("Yes", "yes.", True),
        ("  two\n words ", "Two words", True),
        ("STRASSE", "straße", True),
        ("a .", "a", True),
        ("a..", "a", False),
        ("a", "b", False),
        (".", "", True),
    ],
)
def test_exact_match(answer: str, reference: str, equal: bool) -> None:
    assert exact_match(answer, ["something else", reference]) is equal


def test_references_are_required() -> None:
    for metric in (rouge_l, exact_match):
        with pytest.raises(ValueError, match="reference"):
            metric("a", [])


def test_recovered_share_is_a_ratio_of_means() -> None:
    assert recovered_share(4.0, 2.0, 1.0) == pytest.approx(2 / 3)
    assert recovered_share([4.0, 2.0], [3.0, 2.0], [1.0, 1.0]) == pytest.approx(1 / 4)
    assert recovered_share([0.2], [0.5], [0.7]) == pytest.approx(0.6)  # a score: higher is better
    assert math.isnan(recovered_share(1.0, 0.5, 1.0))


def test_bootstrap_of_equal_ratios_is_a_point() -> None:
    assert paired_bootstrap([2.0, 4.0, 6.0], [1, 2, 3]) == pytest.approx((2, 2, 2))


def test_bootstrap_agrees_with_scipys() -> None:
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 9, size=60).astype(float)
    differences = weights * rng.normal(-0.3, 1, size=60)
    low, mid, high = paired_bootstrap(differences, weights, n=6_000)
    reference = bootstrap(
        (differences, weights),
        lambda d, w, axis: d.sum(axis=axis) / w.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=6_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert mid == pytest.approx(differences.sum() / weights.sum())
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.03)
    assert paired_bootstrap(differences, weights, n=600) == paired_bootstrap(
        differences, weights, n=600
    )


def test_clusters_are_drawn_whole() -> None:
    rng = np.random.default_rng(3)
    effects = np.repeat(rng.normal(size=8), 20)
    labels = [f"source {i // 20}" for i in range(160)]
    alone = paired_bootstrap(effects, np.ones(160))
    together = paired_bootstrap(effects, np.ones(160), labels)
    assert together[2] - together[0] > 3 * (alone[2] - alone[0])
    by_cluster = paired_bootstrap(effects[::20] * 20, np.full(8, 20))
    assert together == pytest.approx(by_cluster)


def test_one_cluster_has_no_interval() -> None:
    assert paired_bootstrap([3.0], [2.0]) == (-math.inf, 1.5, math.inf)
    assert paired_bootstrap([3.0, 1.0], [2.0, 2.0], ["a", "a"])[0] == -math.inf


def test_wrong_weights_and_labels() -> None:
    for weights in ([0.0, 0.0], [2.0, -1.0]):
        with pytest.raises(ValueError, match="weights"):
            paired_bootstrap([1.0, 2.0], weights)
    with pytest.raises(ValueError, match="labels"):
        paired_bootstrap([1.0, 2.0], [1.0, 1.0], ["a"])
