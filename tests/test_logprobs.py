"""Log-probabilities of logits: by hand, against scipy, ties and extremes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from edgelora.engine.logprobs import logprobs


def test_by_hand() -> None:
    logits = np.log(np.array([[1, 2, 4, 1]], np.float32))
    found = logprobs(logits, [1], 2)
    assert found.chosen == pytest.approx(np.log([0.25]))
    assert found.top_ids.tolist() == [[2, 1]]
    assert found.top[0] == pytest.approx(np.log([0.5, 0.25]))


@pytest.mark.parametrize("k", [0, 1, 2, 5, 99, 100, 1000])
def test_equals_scipy(k: int) -> None:
    rng = np.random.default_rng(k)
    logits = rng.normal(0, 10, (7, 100)).astype(np.float32)
    tokens = rng.integers(0, 100, 7)
    found = logprobs(logits, tokens, k)
    expected = log_softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(found.chosen, expected[np.arange(7), tokens], atol=2e-6)
    best = np.argsort(-expected, axis=1)[:, :k]
    assert found.top_ids.tolist() == best.tolist()
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, best, 1), atol=2e-6)


def test_the_lower_id_comes_first_among_equals() -> None:
    logits = np.zeros((1, 50), np.float32)
    logits[0, 40:] = 1.0
    assert logprobs(logits, [0], 3).top_ids[0].tolist()[0] >= 40
    logits[0] = 1.0
    logits[0, 7] = logits[0, 3] = 2.0
    assert logprobs(logits, [0], 2).top_ids.tolist() == [[3, 7]]
    assert logprobs(logits, [0], 1).top_ids.tolist() == [[3]]


def test_large_and_impossible_logits() -> None:
    logits = np.array([[1e4, -1e4, -np.inf], [-1e4, -1e4, -1e4]], np.float32)
    found = logprobs(logits, [0, 2], 1)
    assert found.chosen == pytest.approx([0.0, -np.log(3)])
    assert logprobs(logits[:1], [2]).chosen[0] == -np.inf
