"""Trials of candidates: the budget, the files that stand for them, and the search of the scale."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pico
import pytest

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.build.trials import (
    SCALES,
    Budget,
    Trial,
    make_trial,
    score_trial,
    try_scales,
    try_scales_without,
)
from edgelora.engine.context import Context, open_context
from edgelora.engine.model import ModelOptions, WeightedAdapter, open_model
from edgelora.engine.score import TokenisedExample, count_tokens, mean_loss, score
from edgelora.operators.arbiter import Candidate

ONE = np.ones(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trials")
    base = pico.write_base(folder / "base.gguf")
    facts = {"edgelora.base.id": read_base(base).identity.id}
    for i in range(4):
        pico.write_random_lora(folder / f"{i}.gguf", base, seed=i, metadata=facts)
    return folder


@pytest.fixture(scope="module")
def paths(folder: Path) -> list[Path]:
    return [folder / f"{i}.gguf" for i in range(4)]


@pytest.fixture(scope="module")
def context(folder: Path) -> Iterator[Context]:
    with (
        open_model(folder / "base.gguf", ModelOptions(n_threads=1)) as model,
        open_context(model) as context,
    ):
        yield context


def examples_liking(context: Context, path: Path, scale: float) -> list[TokenisedExample]:
    """Prompts whose completions are the likeliest tokens under an adapter at a scale."""
    rng = np.random.default_rng(0)
    prompts = [tuple(int(t) for t in rng.integers(5, 300, 6)) for _ in range(12)]
    context.apply([WeightedAdapter(path, scale)])
    asked = [TokenisedExample(prompt, ()) for prompt in prompts]
    answers = score(context, asked, max_answer=4)
    return [
        TokenisedExample(prompt, answer.answer or (2,))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def measured(context: Context, path: Path, examples: list[TokenisedExample]) -> list[float]:
    """The loss at each of SCALES."""
    losses = []
    for scale in SCALES:
        context.apply([WeightedAdapter(path, scale)])
        losses.append(mean_loss(score(context, examples)))
    return losses


def test_a_budget_gives_what_it_has() -> None:
    budget = Budget(10)
    assert budget.take(7) and budget.left == 3 and not budget.was_short
    assert not budget.take(4) and budget.left == 3 and budget.was_short
    assert budget.take(3) and budget.left == 0 and budget.n_used == 10
    assert budget.take(0) and not budget.take(1)


def test_a_single_adapter_is_its_own_file(paths: list[Path], tmp_path: Path) -> None:
    trial = make_trial("nearest", np.array([0.0, 0.0, 0.8, 0.0]), paths, tmp_path)
    assert trial.path == paths[2] and not list(tmp_path.iterdir())
    assert trial.candidate.coefficients.tolist() == [0, 0, 1, 0]
    assert trial.candidate.scale == 0.8 and math.isnan(trial.loss)
    assert trial.weighted() == [WeightedAdapter(paths[2], 0.8)]


def test_negligible_coefficients_are_dropped_and_the_rest_rounded(
    paths: list[Path], tmp_path: Path
) -> None:
    given = np.array([0.123456, -0.5, 0.0049, 0.3])
    trial = make_trial("a name", given, paths, tmp_path)
    assert trial.candidate.coefficients.tolist() == [0.1235, -0.5, 0.0, 0.3]
    assert trial.candidate.scale == 1.0 and trial.path == tmp_path / "a-name.gguf"
    provenance = json.loads(open_lora(trial.path).metadata["edgelora.provenance"])
    assert [s["coefficient"] for s in provenance["sources"]] == [0.1235, -0.5, 0.3]


def test_noise_in_the_coefficients_changes_no_byte(paths: list[Path], tmp_path: Path) -> None:
    given, noise = np.array([0.25, 0.5, 0.0, 0.25]), np.array([1e-9, -1e-9, 2e-9, 0])
    one = make_trial("one", given, paths, tmp_path)
    two = make_trial("two", given + noise, paths, tmp_path)
    assert one.path.read_bytes() == two.path.read_bytes()


def test_a_trial_of_several_scores_as_their_weighted_sum(
    context: Context, paths: list[Path], tmp_path: Path
) -> None:
    examples = examples_liking(context, paths[0], 2.0)
    trial = make_trial("sum", np.array([0.7, 0.4, 0.0, 0.0]), paths, tmp_path)
    merged = mean_loss(score_trial(context, trial, examples))
    context.apply([WeightedAdapter(paths[0], 0.7), WeightedAdapter(paths[1], 0.4)])
    assert merged == pytest.approx(mean_loss(score(context, examples)), abs=0.05)
    base = mean_loss(score_trial(context, None, examples))
    assert abs(base - merged) > 0.1


@pytest.mark.parametrize("scale", [2.8, 0.35])
def test_the_best_scale_is_found_by_climbing(
    context: Context, paths: list[Path], scale: float
) -> None:
    examples = examples_liking(context, paths[1], scale)
    losses = measured(context, paths[1], examples)
    budget = Budget(10**6)
    found = try_scales(context, Trial(Candidate("it", ONE), paths[1]), examples, budget)
    at = SCALES.index(found.candidate.scale)
    assert found.loss == pytest.approx(losses[at], abs=1e-6)
    assert at != SCALES.index(1.0) and losses[at] < losses[SCALES.index(1.0)]
    # Nothing better beside it: a climb stops at a hilltop.
    assert all(losses[at] <= losses[i] for i in (at - 1, at + 1) if 0 <= i < len(SCALES))
    assert budget.n_used % count_tokens(examples) == 0
    assert budget.n_used <= len(SCALES) * count_tokens(examples)


def test_the_scale_without_some_examples_is_the_best_of_those_tried_for_the_others(
    context: Context, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the examples like twice the adapter, the others like none of it."""
    liking = examples_liking(context, paths[1], 2.0)[:6]
    examples = [*liking, *examples_liking(context, paths[1], 0.0)[6:]]
    halves = [np.arange(12) < 6, np.arange(12) >= 6]
    trial, tried = Trial(Candidate("it", ONE), paths[1]), []
    with monkeypatch.context() as patch:
        real = Context.apply
        patch.setattr(Context, "apply", lambda c, a: tried.append(a[0].weight) or real(c, a))
        found, scales = try_scales_without(context, trial, examples, Budget(10**6), halves)
    alone = try_scales(context, trial, examples, Budget(10**6))
    assert (found.candidate.scale, found.loss) == (alone.candidate.scale, alone.loss)
    for out, scale in zip(halves, scales, strict=True):
        kept = [e for e, is_out in zip(examples, out, strict=True) if not is_out]
        losses = dict(zip(SCALES, measured(context, paths[1], kept), strict=True))
        assert scale == min(tried, key=lambda s: losses[s])
    assert len(tried) >= 2 and scales[0] < scales[1]


def test_a_scale_multiplies_the_candidates_own(context: Context, paths: list[Path]) -> None:
    examples = examples_liking(context, paths[1], 2.8)
    trial = Trial(Candidate("it", ONE, 0.5), paths[1])
    found = try_scales(context, trial, examples, Budget(10**6))
    assert found.candidate.scale / 0.5 in [pytest.approx(s) for s in SCALES]
    assert found.candidate.scale > 0.5


def test_the_search_stops_when_the_budget_is_spent(context: Context, paths: list[Path]) -> None:
    examples = examples_liking(context, paths[1], 2.8)
    cost, trial = count_tokens(examples), Trial(Candidate("it", ONE), paths[1])
    losses = measured(context, paths[1], examples)
    for n_passes in range(3):
        budget = Budget(n_passes * cost + cost - 1)
        before = context.n_decoded
        found = try_scales(context, trial, examples, budget)
        assert context.n_decoded - before == budget.n_used == n_passes * cost
        assert budget.was_short
        at = SCALES.index(found.candidate.scale)
        if n_passes:
            assert found.loss == pytest.approx(losses[at], abs=1e-6)
        else:
            assert found.candidate.scale == 1.0 and math.isnan(found.loss)
