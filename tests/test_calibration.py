"""Temperatures, shortlists and priors fitted on a bank: by hand, beside scipy, as a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelora.bank import open_bank
from edgelora.bank.calibration import (
    calibration_path,
    parse_calibration,
    read_calibration,
    write_calibration,
)
from edgelora.errors import EdgeLoRAError, InvalidFile
from edgelora.operators.calibration import Calibration, Evidence, Fit, calibrate
from edgelora.operators.heads import softmin
from edgelora.operators.mixture import solve

N = 12
RNG = np.random.default_rng(1)


def evidence(*, with_losses: bool = False) -> Evidence:
    """12 datasets from 6 sources in 3 categories; near ones are often of the same category."""
    categories = [f"c{i % 3}" for i in range(N)]
    sources = [frozenset({f"s{i // 2}"}) for i in range(N)]
    same = np.array([[a == b for b in categories] for a in categories])
    distances = np.where(same, 1.0, 2.0) + RNG.gumbel(size=(N, N)) / 2
    points = np.concatenate([np.eye(3)[[i % 3 for i in range(N)]], RNG.normal(size=(N, 4)) / 3], 1)
    found = Evidence([f"a{i}" for i in range(N)], sources, categories, {"bures": distances},
                     gram=points @ points.T)  # fmt: skip
    if not with_losses:
        return found
    gains = np.where(same, 1.0, -0.2) + RNG.normal(size=(2, N, N)) / 10
    return replace(found, losses=3.0 - gains, base_losses=np.full((2, N), 3.0))


def allowed(found: Evidence) -> NDArray[np.bool_]:
    return np.array([[not a & b for b in found.sources] for a in found.sources])


def score_of(found: Evidence, weights: list[NDArray[np.float64]]) -> float:
    """Mean log-weight of the same category, plainly: weights (n,) for each dataset, others inf."""
    total = []
    for i, row in enumerate(weights):
        right = [w for w, c in zip(row, found.categories, strict=True) if c == found.categories[i]]
        total.append(np.log(sum(right)))
    return float(np.mean(total))


def softmins(found: Evidence, temperature: float) -> list[NDArray[np.float64]]:
    costs = np.where(allowed(found), found.distances["bures"], np.inf)
    return [softmin(row, temperature) for row in costs]


def test_the_temperature_maximises_the_likelihood_of_the_right_adapters() -> None:
    found = evidence()
    fit = calibrate(found).distances["bures"]
    assert fit.score == pytest.approx(score_of(found, softmins(found, fit.temperature)))
    best = max(
        score_of(found, softmins(found, t)) for t in np.exp(np.linspace(np.log(1e-3), 5, 3_000))
    )
    assert fit.score == pytest.approx(best, abs=1e-5) and fit.score > fit.uniform
    assert fit.uniform == pytest.approx(score_of(found, softmins(found, 1e9)), abs=1e-6)


def test_by_hand_the_weight_is_the_share_that_is_right() -> None:
    """The nearest of two is right for 6 of 8 datasets: it gets 3/4, at temperature gap / ln 3."""
    n = 24
    names = [f"a{i}" for i in range(n)]
    distances = np.full((n, n), np.nan)
    losses, base = np.full((2, n, n), np.nan), np.full((2, n), 2.0)
    for i in range(8):
        near, far = 8 + 2 * i, 9 + 2 * i
        distances[i, [near, far]] = [1.0, 1.5]
        losses[:, i, [near, far]] = [1.0, 2.0] if i < 6 else [2.0, 1.0]
    found = Evidence(names, [frozenset({n}) for n in names], [""] * n, {"bures": distances},
                     losses=losses, base_losses=base)  # fmt: skip
    made = calibrate(found, share=0.75)
    assert made.priors["a8"] == pytest.approx(2 / 3) and made.priors["a9"] == pytest.approx(1 / 3)
    # Each adapter served one dataset only: its prior there, without that dataset, is 1/2.
    fit = made.distances["bures"]
    assert fit.temperature == pytest.approx(0.5 / np.log(3.0), rel=1e-3)
    assert fit.score == pytest.approx((6 * np.log(0.75) + 2 * np.log(0.25)) / 8, abs=1e-6)
    assert made.n_targets == 8 and made.shortlists == {"bures": 1}
    assert calibrate(found, share=0.76).shortlists == {"bures": 2}
    assert made.evidence == "losses" and made.mixture is None


def test_mixture_matching_is_judged_without_the_own_source() -> None:
    found = evidence()
    made = calibrate(found).mixture
    assert made is not None
    weights = []
    for i in range(N):
        others = np.flatnonzero(allowed(found)[i])
        gram, cross = found.gram[np.ix_(others, others)], found.gram[i, others]
        slopes = 2 * (gram.mean(axis=1) - cross)
        row = np.zeros(N)
        row[others], _ = solve(gram, cross, made.temperature * slopes.std())
        weights.append(row)
    assert made.score == pytest.approx(score_of(found, weights), abs=0.02)


def test_losses_give_priors_without_the_own_source_and_a_temperature_for_losses() -> None:
    found = evidence(with_losses=True)
    made = calibrate(found)
    assert found.losses is not None
    helps = allowed(found) & (found.losses.mean(axis=0) < 3.0)
    for j, name in enumerate(found.names):
        assert made.priors[name] == pytest.approx(
            (helps[:, j].sum() + 1) / (allowed(found)[:, j].sum() + 2)
        )
    assert made.gibbs is not None and made.gibbs.score > made.gibbs.uniform + 0.5
    assert made.gibbs.temperature < 1.0


def same(a: Calibration, b: Calibration) -> None:
    """Equal but for the order of float sums."""
    assert a.shortlists == b.shortlists and a.n_targets == b.n_targets
    assert a.priors == pytest.approx(b.priors)
    assert a.mixture and b.mixture and a.gibbs and b.gibbs
    pairs = [(a.distances["bures"], b.distances["bures"]), (a.mixture, b.mixture)]
    for x, y in [*pairs, (a.gibbs, b.gibbs)]:
        assert (x.temperature, x.score) == pytest.approx((y.temperature, y.score), rel=1e-4)


def test_sources_that_are_left_out_say_nothing() -> None:
    """The same as if their adapters and datasets were not in the bank at all."""
    found = evidence(with_losses=True)
    out = frozenset({"s0"})
    kept = [i for i, sources in enumerate(found.sources) if not sources & out]
    grid = np.ix_(kept, kept)
    assert found.gram is not None and found.losses is not None and found.base_losses is not None
    smaller = Evidence(
        [found.names[i] for i in kept], [found.sources[i] for i in kept],
        [found.categories[i] for i in kept], {"bures": found.distances["bures"][grid]},
        gram=found.gram[grid], losses=found.losses[(slice(None), *grid)],
        base_losses=found.base_losses[:, kept],
    )  # fmt: skip
    same(calibrate(found, left_out=out), calibrate(smaller))
    wild = found.distances["bures"].copy()
    wild[[0, 1]], wild[:, [0, 1]] = 77.0, -77.0
    changed = replace(found, distances={"bures": wild})
    same(calibrate(changed, left_out=out), calibrate(found, left_out=out))


def test_too_little_to_fit_on_is_said() -> None:
    found = evidence()
    with pytest.raises(EdgeLoRAError, match="0 of the bank's 12.*same category.*needs 8"):
        calibrate(replace(found, categories=[""] * N))
    hopeless = replace(found, losses=np.full((2, N, N), 9.0), base_losses=np.ones((2, N)))
    with pytest.raises(EdgeLoRAError, match="are helped by an adapter"):
        calibrate(hopeless)
    with pytest.raises(ValueError, match="not 12 x 12"):
        calibrate(replace(found, distances={"bures": np.ones((2, 2))}))
    with pytest.raises(ValueError, match="no distance"):
        calibrate(replace(found, distances={}))


def test_equal_distances_give_equal_weights() -> None:
    found = replace(evidence(), distances={"bures": np.ones((N, N))})
    fit = calibrate(found).distances["bures"]
    assert fit.score == pytest.approx(fit.uniform) and fit.temperature == 1.0


def test_a_calibration_is_kept_and_read_again(tmp_path: Path) -> None:
    bank = open_bank(tmp_path / "bank", create=True)
    assert read_calibration(bank, "abc") is None
    values = calibrate(evidence(with_losses=True))
    path = write_calibration(bank, "abc", values)
    assert path == calibration_path(bank, "abc") and path.stat().st_size < 4_000
    stored = read_calibration(bank, "abc")
    assert stored is not None and stored.values == values and not stored.is_stale([])


def test_a_hostile_file_is_refused(tmp_path: Path) -> None:
    bank = open_bank(tmp_path / "bank", create=True)
    good = json.loads(write_calibration(bank, "abc", calibrate(evidence())).read_bytes())
    fit = {"temperature": 1.0, "score": -1.0, "uniform": -1.0}
    for change in (
        {"version": 2}, {"format": "bank"}, {"base": 3}, {"adapters": ""}, {"values": []},
        {"values": {**good["values"], "distances": {}}},
        {"values": {**good["values"], "distances": {"bures": {**fit, "temperature": 0}}}},
        {"values": {**good["values"], "distances": {"bures": {**fit, "temperature": 1e300}}}},
        {"values": {**good["values"], "distances": {"bures": {**fit, "temperature": "1"}}}},
        {"values": {**good["values"], "shortlists": {"bures": 0}}},
        {"values": {**good["values"], "shortlists": {"bures": True}}},
        {"values": {**good["values"], "priors": {"a": 2.0}}},
        {"values": {**good["values"], "priors": {"a": 0.0}}},
        {"values": {**good["values"], "evidence": "faith"}},
        {"values": {**good["values"], "gibbs": [1]}},
    ):  # fmt: skip
        with pytest.raises(InvalidFile, match="not a sound calibration"):
            parse_calibration(json.dumps({**good, **change}).encode(), "c.json")
    for data in (b"", b"[]", b"{", b"[" * 100_000, b'{"version": NaN}', b"\xff"):
        with pytest.raises(InvalidFile):
            parse_calibration(data, "c.json")
    moved = calibration_path(bank, "other")
    moved.write_bytes(calibration_path(bank, "abc").read_bytes())
    with pytest.raises(InvalidFile, match="for the base abc"):
        read_calibration(bank, "other")
    assert Fit(**good["values"]["mixture"]).temperature > 0
