"""The arbiter: its rule on losses made by hand, and the standard error by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgelora.operators.arbiter import Candidate, choose, paired_difference

N = 16
TOKENS = np.full(N, 2.0)
NOISE = np.tile([0.4, -0.4], N // 2)
BASE = np.full(N, 4.0)


def named(*names: str) -> list[Candidate]:
    return [Candidate(name, np.array([1.0])) for name in names]


def test_the_lowest_loss_wins() -> None:
    verdict = choose(named("mean", "nearest"), [BASE - 1 + NOISE, BASE - 2 - NOISE], TOKENS, BASE)
    assert verdict.chosen is not None and verdict.chosen.name == "nearest"
    assert (verdict.position, verdict.base_loss) == (1, 2.0)
    assert [row.loss for row in verdict.table] == pytest.approx([1.5, 1.0])
    assert verdict.table[1].difference == pytest.approx(-1.0)
    # Deviations of 0.4 over 16 examples: 0.4 * sqrt(16 * 16 / 15) / 32.
    assert verdict.table[1].standard_error == pytest.approx(0.4 * math.sqrt(256 / 15) / 32)
    assert "better by 1.0000" in verdict.reasons[-1]


def test_an_improvement_within_the_noise_is_none() -> None:
    error = 0.4 * math.sqrt(256 / 15) / 32
    for factor, eligible in ((0.9, False), (1.1, True)):
        verdict = choose(named("a"), [BASE - 2 * factor * error + NOISE], TOKENS, BASE)
        assert (verdict.chosen is not None) is eligible
        assert verdict.table[0].eligible is eligible
    quiet = choose(named("a"), [BASE - 0.01], TOKENS, BASE)
    assert quiet.chosen is not None  # tiny, but without any noise


def test_worse_equal_or_broken_candidates_leave_the_base() -> None:
    broken = BASE - 1
    broken[3] = np.nan
    infinite = np.full(N, np.inf)
    verdict = choose(
        named("worse", "equal", "nan", "inf"), [BASE + 1, BASE, broken, infinite], TOKENS, BASE
    )
    assert (verdict.chosen, verdict.position) == (None, None)
    assert "no better than the base" in verdict.reasons[0]
    assert "not finite" in verdict.reasons[2]
    assert "the base stays" in verdict.reasons[-1]


def test_the_simpler_of_two_tied_candidates_is_taken() -> None:
    spread = np.tile([1.0, -1.0], N // 2)
    best = BASE - 2 + spread - 0.01  # by 0.01 on average, but 1.0 apart either way
    verdict = choose(named("simple", "fancy"), [BASE - 2, best], TOKENS, BASE)
    assert verdict.chosen is not None and verdict.chosen.name == "simple"
    assert "simpler" in verdict.reasons[-2]
    clear = choose(named("simple", "fancy"), [BASE - 2, BASE - 2.01], TOKENS, BASE)
    assert clear.chosen is not None and clear.chosen.name == "fancy"
    same = choose(named("simple", "fancy"), [BASE - 2, BASE - 2], TOKENS, BASE)
    assert same.position == 0


def test_one_example_proves_nothing() -> None:
    verdict = choose(named("a"), [[0.1]], [1], [9.0])
    assert verdict.chosen is None
    assert math.isnan(verdict.table[0].standard_error)
    assert "single example" in verdict.reasons[0]


def test_no_candidates() -> None:
    assert choose([], [], TOKENS, BASE).chosen is None


def test_the_standard_error_is_that_of_repeated_samples() -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[float, float]:
        tokens = rng.integers(1, 8, size=60).astype(float)
        base = rng.gamma(2, 1, size=60) * tokens
        nll = base + tokens * rng.normal(-0.2, 0.5, size=60)
        return paired_difference(nll, base, tokens)

    differences, errors = np.array([draw() for _ in range(3_000)]).T
    assert errors.mean() == pytest.approx(differences.std(), rel=0.06)
    assert differences.mean() == pytest.approx(-0.2, abs=0.01)


@pytest.mark.parametrize(
    ("nll", "tokens", "base"),
    [
        ([[1.0]], [1, 1], [1.0, 1.0]),
        ([[1.0, 1.0]], [1, 0], [1.0, 1.0]),
        ([[1.0, 1.0]], [1, 1], [1.0, np.nan]),
        ([[1.0, 1.0]], [1, 1], [1.0]),
        ([[]], [], []),
        ([[1.0, 1.0]] * 2, [1, 1], [1.0, 1.0]),
    ],
)
def test_wrong_shapes_are_refused(nll: list, tokens: list, base: list) -> None:
    with pytest.raises(ValueError, match="losses|loss"):
        choose(named("a"), nll, tokens, base)
