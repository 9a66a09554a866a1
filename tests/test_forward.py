"""Searches by forward passes on a pico bank: slopes by gradients, folds by measuring anew."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import builds
import numpy as np
import pico
import pytest
from builds import World

from edgelora.adapters.gguf_lora import open_loras
from edgelora.bank import open_bank
from edgelora.build import alone
from edgelora.build.alone import measure_adapters, open_head
from edgelora.build.crossing import N_FOLDS, assign_folds, count_crossed_tokens, owners_of, without
from edgelora.build.forward import SEARCHES, begin_search, find_trials
from edgelora.build.linearising import _slopes, relinearised
from edgelora.build.passes import Passes
from edgelora.build.pool import Pool, open_pool
from edgelora.build.proposals import WARM_STARTS
from edgelora.build.search import Search
from edgelora.build.trials import Budget, Trial, least_loss, score_trial
from edgelora.datasets.read import read_dataset
from edgelora.engine.context import open_context
from edgelora.engine.hidden import head_matrix
from edgelora.engine.model import Model, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.engine.score import TokenisedExample, count_tokens, mean_loss, open_for, score
from edgelora.errors import EdgeLoRAError
from edgelora.gradient.decoder import open_decoder
from edgelora.gradient.descent import rank_adapters
from edgelora.gradient.updates import Combined
from edgelora.operators import surrogate
from edgelora.operators.searches import Spent

ENOUGH = 10**6


@pytest.fixture(scope="module")
def pool(world: World, model: Model) -> Pool:
    return open_pool(open_bank(world.bank), model.base.identity, ())


@pytest.fixture(scope="module")
def texts(world: World, model: Model) -> list[TokenisedExample]:
    examples = read_dataset(world.helped, limit=12).examples
    return sorted(
        tokenise_examples(model, model_template(model), examples), key=lambda e: e.n_tokens
    )


@pytest.fixture
def begin(world: World, model: Model, pool: Pool, texts: list[TokenisedExample], tmp_path: Path):
    def begin(operator: str = "auto", budget: int = ENOUGH, **more: object) -> Search:
        examples = read_dataset(world.helped, limit=12).examples
        search = begin_search(model, pool, examples, texts, operator, tmp_path, Budget(budget))
        return replace(search, **more)

    return begin


def found_by(search: Search, operator: str) -> list[Trial]:
    trials: list[Trial] = []
    search = replace(search, folder=Path(tempfile.mkdtemp(dir=search.folder)))
    find_trials(search, operator, trials)
    return trials


def real_loss(model: Model, trial: Trial, texts: list[TokenisedExample]) -> float:
    with open_context(model) as context:
        loss = mean_loss(score_trial(context, trial, texts))
    model.unload(trial.path)
    return loss


def test_every_search_has_a_warm_start() -> None:
    assert set(SEARCHES) == set(WARM_STARTS)


def test_slopes_are_those_of_the_gradient_through_the_base(
    world: World, model: Model, texts: list[TokenisedExample], tmp_path: Path
) -> None:
    """At a mean of small adapters: the surrogate's slope at no step, by numpy's backward pass."""
    bank = open_bank(tmp_path / "bank", create=True)
    for i in range(4):
        bank.add(pico.write_peft(tmp_path / f"small{i}", seed=i, size=0.02), model.base)
    pool = open_pool(bank, model.base.identity, ())
    search = begin_search(model, pool, (), texts, "uniform", tmp_path, Budget(ENOUGH))
    (best,) = found_by(search, "uniform")
    here, slopes = _slopes(search, best, range(4))
    _, downhill = surrogate._losses_and_slopes(here.hidden, here.targets, open_head(model))
    found = np.einsum("ktd,td->k", slopes, downhill) / len(here.targets)
    files = open_loras(pool.paths)
    names = {name for file in files for name in file.plan}
    at = Combined(files, {name: best.weights.tolist() for name in names})
    expected = rank_adapters(open_decoder(world.base, n_threads=1), files, texts, at)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_linearising_again_lowers_the_real_loss(
    begin, model: Model, texts: list[TokenisedExample]
) -> None:
    once, again = (least_loss(found_by(begin(n_linearisations=n), "auto")) for n in (1, 3))
    assert again.candidate.name.startswith("surrogate, ") and "x" in again.candidate.name
    assert again.loss < once.loss - 0.02
    # What was found better by a pass is what the file does; the svd of a trial may cut a little.
    assert real_loss(model, again, texts) == pytest.approx(again.loss, abs=0.02)


def test_a_step_that_a_real_pass_refuses_is_shrunk_or_dropped(begin, monkeypatch) -> None:
    search = begin("surrogate", n_linearisations=2)
    trials = found_by(search, "surrogate")
    best = least_loss(trials)
    good = surrogate.fit_step

    def away(*args, **more):  # the other way, far
        return -30.0 * good(*args, **more)

    monkeypatch.setattr(surrogate, "fit_step", away)
    assert relinearised(search, trials) is best


@pytest.mark.parametrize("operator", list(SEARCHES))
def test_a_search_finds_one_combination_no_worse_than_its_start(
    operator: str, begin, model: Model, texts: list[TokenisedExample]
) -> None:
    search = begin(operator)
    (trial,) = found_by(search, operator)
    assert real_loss(model, trial, texts) == pytest.approx(trial.loss, abs=0.02)
    if operator != "halving":
        start = least_loss(found_by(begin("surrogate"), "surrogate"))
        assert trial.loss <= start.loss + 0.02
    (again,) = found_by(begin(operator), operator)
    assert again.weights.tolist() == trial.weights.tolist()


@pytest.mark.parametrize("operator", ["auto", *SEARCHES])
@pytest.mark.parametrize("n_passes", [7, 9, 12, 20])
def test_no_more_is_computed_than_the_budget_allows(
    operator: str, n_passes: int, begin, texts: list[TokenisedExample], decoded: list[int]
) -> None:
    search = begin(operator, budget=n_passes * count_tokens(texts))
    trials = found_by(search, operator)
    assert trials and search.budget.n_used <= search.budget.n_tokens
    assert sum(decoded) <= search.budget.n_used


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch, begin) -> list[int]:
    """Tokens of batches after embedding, which no budget of a search pays for."""
    from edgelora.engine.context import Context

    sizes: list[int] = []
    real, measure = Context.decode, measure_adapters

    def counting(context: Context, rows):
        sizes.append(len(rows))
        return real(context, rows)

    def measured(*args, **more):
        sizes.clear()
        return measure(*args, **more)

    monkeypatch.setattr(Context, "decode", counting)
    monkeypatch.setattr("edgelora.build.forward.measure_adapters", measured)
    return sizes


def test_a_budget_too_small_for_a_field_says_so(begin) -> None:
    search = begin("halving")
    short = replace(search, budget=Budget(3))
    with pytest.raises(EdgeLoRAError, match="no adapter could be measured"):
        found_by(short, "halving")


def test_folds_share_no_prompt_and_are_of_one_size(texts: list[TokenisedExample]) -> None:
    folds = assign_folds(texts)
    assert np.bincount(folds).tolist() == [4, 4, 4]
    twice = [*texts[:3], *texts[:3], *texts[3:5]]
    folds = assign_folds(twice)
    assert folds[:3].tolist() == folds[3:6].tolist() == [0, 1, 2]
    assert assign_folds(texts[:1]).tolist() == [0]
    assert owners_of([replace(texts[0], completion=(1, 2)), replace(texts[1], completion=(3,))]
                     ).tolist() == [0, 0, 1]  # fmt: skip
    parts = [[t for t, f in zip(texts, assign_folds(texts), strict=True) if f == fold]
             for fold in range(N_FOLDS)]  # fmt: skip
    assert count_crossed_tokens(texts) == sum(map(count_tokens, parts))


def test_a_fold_s_coefficients_are_those_of_a_search_without_it(
    begin, model: Model, pool: Pool, texts: list[TokenisedExample]
) -> None:
    """Against real passes on the other examples alone, as if the fold had never been there."""
    folds = assign_folds(texts)
    search = begin(n_linearisations=1, folds=folds)
    trials = found_by(search, "auto")
    assert {len(t.folds) for t in trials} == {N_FOLDS}
    for fold in range(N_FOLDS):
        kept = [t for t, f in zip(texts, folds, strict=True) if f != fold]
        with open_context(model, hidden=True) as context:
            anew = measure_adapters(context, pool, [0, 1, 2, 3], kept)
        cut = without(search.measured, search.left_out[fold])
        np.testing.assert_allclose(cut.losses, anew.losses, atol=1e-3)
        fresh = replace(search, examples=kept, measured=anew, folds=None)
        for trial, other in zip(trials, found_by(fresh, "auto"), strict=True):
            expected = other.weights / other.weights.sum() * trial.folds[fold].sum()
            np.testing.assert_allclose(trial.folds[fold], expected, atol=0.02)


def test_steps_of_folds_never_see_their_fold(begin, texts: list[TokenisedExample]) -> None:
    """Other targets in one fold change the coefficients of the others only."""
    folds = assign_folds(texts)
    plain = relinearised_with_targets(begin, folds, None)
    changed = relinearised_with_targets(begin, folds, 1)
    np.testing.assert_array_equal(changed[1], plain[1])
    assert np.abs(changed[0] - plain[0]).max() > 1e-4
    assert np.abs(changed[2] - plain[2]).max() > 1e-4


def relinearised_with_targets(begin, folds, fold: int | None) -> list[np.ndarray]:
    """One step at one given trial, with the targets of a fold replaced in what was recorded."""
    from edgelora.build import linearising

    search = begin("surrogate", n_linearisations=2, folds=folds)
    best = least_loss(found_by(search, "surrogate"))
    here, slopes = _slopes(search, best, range(4))
    targets = here.targets.copy()
    if fold is not None:
        targets[search.left_out[fold]] = 7
    found = linearising.steps_of(
        search, best, (0, 1, 2, 3), replace(here, targets=targets), slopes, penalty=0.3
    )
    return list(found[1:])


def test_passes_side_by_side_score_as_llama_cpp_does(
    model: Model, pool: Pool, texts: list[TokenisedExample]
) -> None:
    weights = np.array([0.5, 0.0, -0.25])
    with open_context(model) as context:
        budget = Budget(ENOUGH)
        passes = Passes(context, pool.paths[:3], texts, budget)
        loss = passes.loss(weights)
        context.apply([WeightedAdapter(p, w) for p, w in zip(pool.paths, weights, strict=False)])
        assert loss == pytest.approx(mean_loss(score(context, texts)), abs=1e-5)
        assert budget.n_used == count_tokens(texts)
        context.apply([])


def test_the_hopeless_are_cut_short_and_never_look_better(
    model: Model, pool: Pool, texts: list[TokenisedExample]
) -> None:
    with open_context(model) as context:
        budget = Budget(ENOUGH)
        passes = Passes(context, pool.paths[1:2], texts, budget)
        best = passes.loss(np.ones(1))
        used = budget.n_used
        estimate = passes.loss(-4 * np.ones(1))
        assert estimate > best and budget.n_used - used == count_tokens(texts[:4])
        again = passes.loss(0.99 * np.ones(1))
        assert math.isfinite(again)
        poor = Passes(context, pool.paths[:1], texts, Budget(5))
        with pytest.raises(Spent):
            poor.loss(np.ones(1))
        context.apply([])


def test_little_memory_measures_the_same(
    world: World, pool: Pool, texts: list[TokenisedExample], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """States in a file, the head in tiles of one row: on the same weights, the same numbers."""
    monkeypatch.setattr(alone, "_IN_MEMORY_BYTES", 0)
    found = {}
    for low_ram in (False, True):
        options = replace(builds.ONE_THREAD, low_ram=low_ram)
        with (
            open_model(world.base, options) as model,
            open_context(model, hidden=True, exact=True) as context,
        ):
            found[low_ram] = measure_adapters(context, pool, [0, 2], texts, folder=tmp_path)
    plain, small = found[False], found[True]
    assert isinstance(small.slopes, np.memmap) and not isinstance(plain.slopes, np.memmap)
    assert isinstance(small.head, alone.MappedHead)
    np.testing.assert_allclose(small.slopes, plain.slopes, atol=1e-3)
    np.testing.assert_allclose(small.by_token, plain.by_token, atol=1e-2)
    whole = surrogate.WholeHead(head_matrix(model))
    small.head._weights._tile = 1
    rows = plain.base.hidden, plain.base.targets
    for tiled in (small.head, whole):
        losses = surrogate.token_losses(*rows, tiled)
        np.testing.assert_allclose(losses, surrogate.token_losses(*rows, plain.head), rtol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_context_of_little_memory_has_room_for_the_longest(
    world: World, texts: list[TokenisedExample]
) -> None:
    long = replace(texts[0], prompt=texts[0].prompt * (1100 // len(texts[0].prompt) + 1))
    options = replace(builds.ONE_THREAD, low_ram=True)
    with open_model(world.base, options) as model:
        for examples, least in ((texts, 1024), ([*texts, long], long.n_tokens)):
            with open_for(model, examples) as context:
                assert min(least, model.n_ctx_train) <= context.n_ctx < 4096
        with open_for(model, texts) as context, open_context(model) as large:
            assert score(context, texts) == score(large, texts)
