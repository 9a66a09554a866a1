"""Descents on coefficients and factors: steps, folds, early stopping, checkpoints, interruption."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gradient_cases import adapters, examples, write_kind

from edgelora.adapters.gguf_lora import LoraFile, PairPlan, open_lora, write_lora
from edgelora.adapters.merge import merge_adapters
from edgelora.engine.context import open_context
from edgelora.engine.model import ModelOptions, WeightedAdapter, open_model
from edgelora.engine.score import Score, TokenisedExample, mean_loss, score
from edgelora.errors import EdgeLoRAError, IncompatibleAdapter, InvalidFile
from edgelora.gradient import layers, minimise
from edgelora.gradient.adam import Adam, advance, begin
from edgelora.gradient.checkpoint import Checkpoint, Tally, from_bytes
from edgelora.gradient.decoder import Decoder, PassOptions, open_decoder
from edgelora.gradient.descent import (
    DescentOptions,
    count_descent_tokens,
    descend,
    objective_examples,
    rank_adapters,
)
from edgelora.gradient.folds import make_folds, units_of_pass
from edgelora.gradient.minimise import Interrupted, Minimisation, Schedule, Step, vouched_loss
from edgelora.gradient.observers import CoefficientGradients
from edgelora.gradient.polish import PolishOptions, count_polish_tokens, fresh_pairs, polish
from edgelora.gradient.stacks import Stacks, bytes_of_stacks
from edgelora.gradient.updates import Combined
from edgelora.gradient.variables import Coefficients, Factors

SHORT = DescentOptions(n_passes=3, step=0.1, n_folds=0, batch_size=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kind("mistral", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bank(base: Path) -> list[LoraFile]:
    return adapters(base, size=0.1)


@pytest.fixture
def decoder(base: Path) -> Decoder:
    return open_decoder(base)


def loss_of(decoder: Decoder, bank: list[LoraFile], found: dict[str, np.ndarray]) -> float:
    rows = {name: row.tolist() for name, row in found.items()}
    return mean_loss(decoder.losses(examples(6), Combined(bank, rows)))


# Adam


def test_the_first_step_is_of_the_given_size() -> None:
    track = begin(np.array([1.0, 2.0, 3.0]))
    after = advance(track, np.array([1e-3, -50.0, 0.0]), track.values, Adam(step=0.1))
    assert after.values == pytest.approx([0.9, 2.1, 3.0], rel=1e-6)


def test_steps_are_those_of_the_paper_s_algorithm() -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal(5)
    track = begin(start)
    w, m, v = start.copy(), np.zeros(5), np.zeros(5)
    for t in range(1, 20):
        g = rng.standard_normal(5)
        track = advance(track, g, start, Adam(0.05, 0.8, 0.95))
        m = 0.8 * m + 0.2 * g
        v = 0.95 * v + 0.05 * g**2
        w = w - 0.05 * (m / (1 - 0.8**t)) / np.sqrt(v / (1 - 0.95**t))
    assert track.values == pytest.approx(w, rel=1e-9)
    assert track.n_steps == 19


def test_a_quadratic_s_minimum_is_found() -> None:
    goal = np.array([0.3, -0.2])
    track = begin(np.zeros(2))
    for _ in range(600):
        gradient = np.array([1.0, 30.0]) * (track.values - goal)
        track = advance(track, gradient, np.zeros(2), Adam(0.01))
    assert track.values == pytest.approx(goal, abs=1e-3)


def test_the_penalty_pulls_back_to_the_start() -> None:
    start = np.array([0.5])
    away = dataclasses.replace(begin(start), values=np.array([1.5]))
    after = advance(away, np.zeros(1), start, Adam(step=0.1, penalty=2.0))
    assert after.values == pytest.approx([1.3])


def test_sparsity_pulls_to_zero_and_no_further() -> None:
    track = begin(np.array([0.5, -0.5, 0.03, -0.03]))
    after = advance(track, np.zeros(4), track.values, Adam(step=0.1, sparsity=0.4))
    assert after.values == pytest.approx([0.46, -0.46, 0.0, 0.0])
    moved = advance(track, np.array([-1.0, 0, 0, 0]), track.values, Adam(step=0.1, sparsity=0.4))
    assert moved.values[0] == pytest.approx(0.5 + 0.1 - 0.04)


def test_the_average_weighs_late_values_more_and_the_start_not_at_all() -> None:
    adam = Adam(step=0.1, averaging=0.5)
    track = begin(np.array([7.0]))
    met = []
    for slope in (1.0, -1.0, 3.0):
        track = advance(track, np.array([slope]), track.values, adam)
        met.append(float(track.values[0]))
    assert track.average == pytest.approx([(met[0] + 2 * met[1] + 4 * met[2]) / 7])
    assert advance(track, np.ones(1), track.values, Adam(step=0.1)).average == pytest.approx(
        advance(track, np.ones(1), track.values, Adam(step=0.1)).values, abs=0
    )


def test_float32_stays_float32() -> None:
    adam = Adam(0.1, penalty=0.1, sparsity=0.1, averaging=0.8)
    ones = np.ones(2, np.float32)
    track = advance(begin(ones), ones, ones, adam)
    arrays = (track.mean, track.square, track.values, track.average)
    assert {a.dtype for a in arrays} == {np.dtype(np.float32)}


# Folds


def test_every_example_is_held_out_once() -> None:
    folds = make_folds(range(7), 3, seed=1)
    assert sorted(i for fold in folds for i in fold.held_out) == list(range(7))
    assert all(sorted(fold.seen + fold.held_out) == list(range(7)) for fold in folds)
    assert sorted(len(fold.held_out) for fold in folds) == [2, 2, 3]
    assert make_folds(range(7), 0, seed=1)[0].seen == tuple(range(7))


def test_examples_of_one_prompt_are_held_out_together() -> None:
    folds = make_folds("aabcdaae", 2, seed=3)
    assert [len({0, 1, 5, 6} & set(fold.held_out)) for fold in folds] in ([0, 4], [4, 0])
    assert sorted(i for fold in folds for i in fold.held_out) == list(range(8))


@pytest.mark.parametrize("n_folds", [1, 4])
def test_too_few_or_too_many_folds_are_refused(n_folds: int) -> None:
    with pytest.raises(EdgeLoRAError, match="of 3 different prompts"):
        make_folds("aabc", n_folds, seed=0)


def test_a_pass_shows_every_example_once_in_another_order() -> None:
    folds = make_folds(range(9), 0, seed=0)
    first, second = (units_of_pass(folds, number, 4, seed=0) for number in (1, 2))
    assert [len(unit.positions) for unit in first] == [4, 4, 1]
    assert sorted(i for unit in first for i in unit.positions) == list(range(9))
    assert first != second
    assert units_of_pass(folds, 0, 4, seed=0) == ()
    (whole,) = units_of_pass(folds, 1, 0, seed=0)
    assert len(whole.positions) == 9


def test_each_fold_is_judged_by_what_it_did_not_see() -> None:
    folds = make_folds(range(6), 2, seed=0)
    units = units_of_pass(folds, 1, 2, seed=0)
    assert [unit.held_out for unit in units] == [False, False, True] * 2
    for number, fold in enumerate(folds):
        own = [unit for unit in units if unit.track == number]
        assert own[-1].positions == fold.held_out
        assert not {i for unit in own[:-1] for i in unit.positions} & set(fold.held_out)


# Descents on coefficients


def test_a_full_batch_step_by_hand(decoder: Decoder, bank: list[LoraFile]) -> None:
    """Adam's first step is `step` against the sign of each slope."""
    start = np.array([0.5, 0.2, -0.1])
    options = DescentOptions(weights="tensor", n_passes=1, batch_size=0, step=0.01, n_folds=0)
    found = descend(decoder, bank, examples(), start, options)
    slopes = CoefficientGradients(bank)
    rows = dict.fromkeys(slopes.names, start.tolist())
    before = decoder.gradients(examples(), Combined(bank, rows), slopes)
    assert found.support_losses == pytest.approx([mean_loss(before)])
    for column, name in enumerate(slopes.names):
        expected = start - 0.01 * np.sign(slopes.values[:, column])
        assert found.coefficients[name] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "n_kinds"), [("component", 15), ("tensor", 15), ("layer", 3), ("adapter", 1)]
)
def test_weights_for_components_tensors_layers_and_adapters(
    weights: str, n_kinds: int, decoder: Decoder, bank: list[LoraFile]
) -> None:
    options = dataclasses.replace(SHORT, weights=weights)
    found = descend(decoder, bank, examples(6), np.zeros(3), options)
    assert len({row.tobytes() for row in found.coefficients.values()}) == n_kinds
    assert loss_of(decoder, bank, found.coefficients) < found.support_losses[0]
    for row in found.coefficients.values():
        assert row.shape == ((3, 4) if weights == "component" else (3,))


@pytest.mark.parametrize("weights", ["component", "tensor"])
def test_the_loss_found_is_that_of_the_merged_file_in_llama_cpp(
    weights: str, base: Path, decoder: Decoder, bank: list[LoraFile], tmp_path: Path
) -> None:
    options = dataclasses.replace(SHORT, weights=weights)
    found = descend(decoder, bank, examples(6), np.full(3, 1 / 3), options)
    merge_adapters(bank, found.coefficients, tmp_path / "m.gguf", method="cat", dtype="f32")
    with (
        open_model(base, ModelOptions(n_threads=1)) as model,
        open_context(model, exact=True) as context,
    ):
        context.apply([WeightedAdapter(tmp_path / "m.gguf")])
        expected = mean_loss(score(context, examples(6)))
    assert loss_of(decoder, bank, found.coefficients) == pytest.approx(expected, rel=1e-5)
    assert expected < found.support_losses[0]


@pytest.mark.parametrize("weights", ["component", "tensor"])
def test_factors_that_are_kept_for_all_steps_give_the_same_bytes(
    weights: str, decoder: Decoder, bank: list[LoraFile]
) -> None:
    options, n_bytes = DescentOptions(weights=weights, n_passes=2), bytes_of_stacks(bank)
    start = np.array([0.5, 0.0, 0.2])  # one adapter takes no part in the first step's sum
    once, kept = (
        descend(decoder, bank, examples(6), start, options, passes=PassOptions(stack_bytes=most))
        for most in (n_bytes - 1, n_bytes)
    )
    assert all((once.coefficients[name] == row).all() for name, row in kept.coefficients.items())
    assert once.held_out_losses == kept.held_out_losses


def test_all_factors_of_a_bank_are_kept_or_none(bank: list[LoraFile]) -> None:
    n_bytes, name = bytes_of_stacks(bank), next(iter(bank[0].plan))
    assert n_bytes == sum(4 * a.size for f in bank for p in f.pairs() for a in (p.lora_a, p.lora_b))
    for most, is_kept in ((n_bytes, True), (n_bytes - 1, False)):
        stacks = Stacks(bank, most)
        members = stacks.members[name]
        assert (stacks.of(name, members) is stacks.of(name, members)) == is_kept
        part = stacks.of(name, members[:1])
        assert part is not stacks.of(name, members[:1]) and set(part.owners) == {members[0]}
        assert stacks.of(name, members, np.float64).lora_a.dtype == np.float64


def test_tokens_are_counted_as_planned(decoder: Decoder, bank: list[LoraFile]) -> None:
    """A gradient pass counts three forwards, a look at held-out examples one."""
    texts = examples(4)
    options = DescentOptions(n_passes=2, batch_size=0, n_folds=2, patience=9, step=0.01)
    found = descend(decoder, bank, texts, np.zeros(3), options)
    folds = make_folds(range(4), 2, 0)

    def rows(positions: Sequence[int]) -> int:
        return decoder.count_rows([texts[i] for i in positions], PassOptions())

    a_pass = sum(3 * rows(fold.seen) + rows(fold.held_out) for fold in folds)
    assert found.n_tokens == rows(range(4)) + 2 * a_pass
    assert count_descent_tokens(decoder, texts, options) == found.n_tokens
    whole = dataclasses.replace(options, n_folds=0)
    assert count_descent_tokens(decoder, texts, whole) == 2 * 3 * rows(range(4))


def test_held_out_losses_are_those_of_what_was_not_seen(
    decoder: Decoder, bank: list[LoraFile]
) -> None:
    texts, start = examples(4), np.full(3, 0.1)
    options = DescentOptions(n_passes=1, batch_size=0, n_folds=2, step=0.01)
    found = descend(decoder, bank, texts, start, options)
    scores, alone = [], []
    for fold in make_folds(range(4), 2, 0):
        seen = [texts[i] for i in fold.seen]
        part = descend(decoder, bank, seen, start, dataclasses.replace(options, n_folds=0))
        alone.append(part.coefficients)
        rows = {name: row.tolist() for name, row in part.coefficients.items()}
        scores += decoder.losses([texts[i] for i in fold.held_out], Combined(bank, rows))
    assert found.held_out_losses[1] == pytest.approx(mean_loss(scores), rel=1e-6)
    if found.n_passes:
        for name, row in found.coefficients.items():
            assert row == pytest.approx((alone[0][name] + alone[1][name]) / 2)


def test_examples_held_out_stop_a_descent_that_learns_from_all_others(
    decoder: Decoder, bank: list[LoraFile]
) -> None:
    """They have no other part in it: it is the descent without them, as far as it is best."""
    seen, start = examples(4), np.full(3, 0.1)
    held_out = [dataclasses.replace(text, prompt=text.prompt[1:]) for text in seen[:2]]
    options = DescentOptions(n_passes=3, patience=9, step=0.01)
    found = descend(decoder, bank, seen, start, options, held_out=held_out)
    assert not found.folds and len(found.held_out_losses) == 4
    assert found.n_passes == np.argmin(found.held_out_losses) > 0
    assert found.n_tokens == count_descent_tokens(decoder, seen, options, held_out=held_out)
    alone_options = dataclasses.replace(options, n_passes=found.n_passes, n_folds=0)
    alone = descend(decoder, bank, seen, start, alone_options)
    assert all((alone.coefficients[name] == row).all() for name, row in found.coefficients.items())
    rows = {name: row.tolist() for name, row in alone.coefficients.items()}
    loss = mean_loss(decoder.losses(held_out, Combined(bank, rows)))
    assert min(found.held_out_losses) == pytest.approx(loss, rel=1e-6)


def test_label_free_objectives(decoder: Decoder, bank: list[LoraFile]) -> None:
    texts = [dataclasses.replace(text, completion=()) for text in examples(4)]
    for objective in ("prompts", "entropy"):
        options = dataclasses.replace(SHORT, objective=objective, n_passes=4)
        found = descend(decoder, bank, texts, np.zeros(3), options)
        assert found.support_losses[-1] < found.support_losses[0]
    (first, *_) = objective_examples(texts, "prompts")
    assert first.prompt + first.completion == texts[0].prompt and len(first.prompt) == 10
    z = decoder.logits(texts[0].prompt, {})[-1:]
    start = decoder.losses(
        objective_examples(texts[:1], "entropy"), {}, PassOptions(objective=layers.entropy)
    )
    assert start[0].nll == pytest.approx(float(layers.entropy(z, np.zeros(1, int))[0][0]), rel=1e-5)
    with pytest.raises(EdgeLoRAError, match="no objective guess"):
        objective_examples(texts, "guess")


def test_ranking_is_by_the_slope_of_whole_adapters(decoder: Decoder, bank: list[LoraFile]) -> None:
    slopes = rank_adapters(decoder, bank, examples(), {})

    def along(index: int, step: float) -> float:
        coefficients = Coefficients(bank, step * np.eye(3)[index], "adapter")
        return mean_loss(decoder.losses(examples(), coefficients.updates(coefficients.start)))

    for index in range(3):
        expected = (along(index, 0.02) - along(index, -0.02)) / 0.04
        assert slopes[index] == pytest.approx(expected, rel=0.02)


def test_unusable_input_is_refused(decoder: Decoder, bank: list[LoraFile], tmp_path: Path) -> None:
    with pytest.raises(EdgeLoRAError, match="3 adapters and a start of shape"):
        descend(decoder, bank, examples(), np.zeros(2), SHORT)
    with pytest.raises(EdgeLoRAError, match="no weights for each head"):
        descend(decoder, bank, examples(), np.zeros(3), dataclasses.replace(SHORT, weights="head"))
    with pytest.raises(EdgeLoRAError, match="no examples to learn from"):
        descend(decoder, bank, [], np.zeros(3), SHORT)
    other = adapters(write_kind("one key head", tmp_path), 1)
    with pytest.raises(IncompatibleAdapter):
        rank_adapters(decoder, other, examples(), {})


def test_a_loss_that_is_no_number_ends_it(decoder: Decoder, bank: list[LoraFile]) -> None:
    with np.errstate(all="ignore"), pytest.raises(EdgeLoRAError, match="smaller step"):
        descend(decoder, bank, examples(), np.full(3, 1e30), SHORT)


# Early stopping, on a loss whose course is written down


class Recorded:
    """Variables whose only value counts the steps, beside a decoder that looks losses up."""

    start = np.zeros(1)

    def updates(self, values: np.ndarray) -> dict[str, int]:
        return {"passes": round(-float(values[0]))}

    def gradient(self, decoder, texts, values, options):  # type: ignore[no-untyped-def]
        return np.ones(1), decoder.losses(texts, self.updates(values), options)


class Curve:
    """A decoder whose loss after some passes is in a list."""

    def __init__(self, *losses: float) -> None:
        self._losses = losses

    def losses(self, texts, updates, options):  # type: ignore[no-untyped-def]
        return [Score(self._losses[updates["passes"]], 1) for _ in texts]

    def count_rows(self, texts, options):  # type: ignore[no-untyped-def]
        return len(texts)


def stop_on(
    *losses: float,
    n_passes: int = 9,
    patience: int = 2,
    n_folds: int = 2,
    enough: float = 0.0,
) -> Checkpoint:
    work = Minimisation(
        Curve(*losses),  # type: ignore[arg-type]
        Recorded(),
        examples(4),
        Adam(step=1.0, momentum=0.0, memory=0.0),
        Schedule(n_passes, 0, n_folds, patience, 0, (0, 1, 2, 3), enough),
        PassOptions(),
        key="",
    )
    return work.run(work.open(None), lambda step: None, None)[0]


@pytest.mark.parametrize(
    ("losses", "best", "n_done"),
    [
        ((5.0, 4.0, 3.0, 3.5, 3.2, 1.0), 2, 4),
        ((5.0, 6.0, 4.0, 4.1, 3.0, 3.1, 3.3, 0.0), 4, 6),
        ((1.0, 2.0, 3.0, 0.0), 0, 2),
        ((5.0, 4.0, 3.0, 2.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5), 9, 9),
    ],
    ids=["a valley", "a bump within patience", "no better than the start", "to the end"],
)
def test_it_stops_at_the_best_of_a_recorded_curve(
    losses: tuple[float, ...], best: int, n_done: int
) -> None:
    state = stop_on(*losses)
    assert state.tally.best_pass == best and np.concatenate(state.best) == pytest.approx(
        [-best] * 2
    )
    assert len(state.tally.held_out_losses) == n_done + 1
    assert state.tally.held_out_losses == pytest.approx(losses[: n_done + 1])


@pytest.mark.parametrize(
    ("losses", "n_done"),
    [((0.9, 0.3, 0.07, 0.05), 2), ((0.9, 0.3, 0.08, 0.09, 0.1, 0.0), 4), ((0.07, 0.0), 0)],
    ids=["below it", "not below it", "at the start"],
)
def test_it_stops_where_the_examples_cannot_vouch_for_less(
    losses: tuple[float, ...], n_done: int
) -> None:
    enough = vouched_loss(examples(4))
    assert enough == pytest.approx(math.log(6 / 5) * 4 / 10)  # four texts, ten tokens
    state = stop_on(*losses, enough=enough)
    assert state.tally.held_out_losses == pytest.approx(losses[: n_done + 1])


def test_only_a_descent_on_answers_stops_where_it_is_sure(
    decoder: Decoder, bank: list[LoraFile]
) -> None:
    def n_looks(enough: float, objective: str = "loss") -> int:
        options = DescentOptions(
            n_passes=2, n_folds=2, step=0.01, enough=enough, objective=objective
        )
        return len(descend(decoder, bank, examples(4), np.full(3, 0.3), options).held_out_losses)

    assert n_looks(1e6) == 1
    assert n_looks(0) == n_looks(1e6, "prompts") == 3


def test_without_folds_all_passes_are_run() -> None:
    state = stop_on(5.0, 6.0, 7.0, 8.0, n_passes=3, n_folds=0)
    assert state.tally.best_pass == 3 and state.tally.held_out_losses == ()
    assert state.tally.support_losses == (5.0, 6.0, 7.0)


# Checkpoints and interruption


class Stop:
    """A listener that interrupts after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, step: Step) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 2, 4, 7])
def test_going_on_gives_the_same_bytes(
    after: int, decoder: Decoder, bank: list[LoraFile], tmp_path: Path
) -> None:
    options = DescentOptions(n_passes=2, n_folds=2, batch_size=2, step=0.05)
    start, path = np.full(3, 0.3), tmp_path / "state"
    whole = descend(decoder, bank, examples(6), start, options, checkpoint=tmp_path / "whole")
    with pytest.raises(Interrupted):
        descend(decoder, bank, examples(6), start, options, checkpoint=path, listen=Stop(after))
    steps: list[Step] = []
    found = descend(
        decoder, bank, examples(6), start, options, checkpoint=path, listen=steps.append
    )
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    for name, row in whole.coefficients.items():
        assert found.coefficients[name].tobytes() == row.tobytes()
    assert dataclasses.replace(found, coefficients={}) == dataclasses.replace(
        whole, coefficients={}
    ) or (found.n_tokens, found.held_out_losses) == (whole.n_tokens, whole.held_out_losses)
    assert len(steps) == 1 + 2 * 2 * 3 - after


def test_the_state_is_written_on_the_way(
    decoder: Decoder, bank: list[LoraFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed leaves the last state that was written."""
    monkeypatch.setattr(minimise, "CHECKPOINT_EVERY_S", 0.0)
    path, seen = tmp_path / "state", []

    def look(step: Step) -> None:
        seen.append(from_bytes(path.read_bytes()).tally.unit if path.exists() else None)

    descend(decoder, bank, examples(6), np.zeros(3), SHORT, checkpoint=path, listen=look)
    assert seen == [None, 1, 2, 0, 1, 2, 0, 1, 2]


def test_a_finished_descent_returns_at_once(
    decoder: Decoder, bank: list[LoraFile], tmp_path: Path
) -> None:
    path, steps = tmp_path / "state", []
    first = descend(decoder, bank, examples(), np.zeros(3), SHORT, checkpoint=path)
    again = descend(
        decoder, bank, examples(), np.zeros(3), SHORT, checkpoint=path, listen=steps.append
    )
    assert not steps and again.n_tokens == first.n_tokens


def test_more_passes_may_follow(decoder: Decoder, bank: list[LoraFile], tmp_path: Path) -> None:
    path, start = tmp_path / "state", np.zeros(3)
    for n_passes in (1, 3):
        options = dataclasses.replace(SHORT, n_passes=n_passes)
        found = descend(decoder, bank, examples(4), start, options, checkpoint=path)
        alone = descend(decoder, bank, examples(4), start, options)
        for name, row in alone.coefficients.items():
            assert (found.coefficients[name] == row).all()
    with pytest.raises(EdgeLoRAError, match="3 passes are done already, more than 2"):
        options = dataclasses.replace(SHORT, n_passes=2)
        descend(decoder, bank, examples(4), start, options, checkpoint=path)


def test_an_interrupt_carries_the_best_so_far(decoder: Decoder, bank: list[LoraFile]) -> None:
    start = np.full(3, 0.3)
    options = dataclasses.replace(SHORT, n_passes=9)
    with pytest.raises(Interrupted) as caught:
        descend(decoder, bank, examples(4), start, options, listen=Stop(1))
    assert caught.value.best.n_passes == 0
    for row in caught.value.best.coefficients.values():
        assert row[row != 0] == pytest.approx(0.3, rel=1e-5)  # the rest is padding
    with pytest.raises(Interrupted) as caught:
        descend(decoder, bank, examples(4), start, options, listen=Stop(5))
    best = caught.value.best
    assert best.n_passes == 2 and isinstance(caught.value, KeyboardInterrupt)
    two = descend(decoder, bank, examples(4), start, dataclasses.replace(SHORT, n_passes=2))
    for name, row in two.coefficients.items():
        assert (best.coefficients[name] == row).all()


def test_another_descent_s_state_is_refused(
    decoder: Decoder, bank: list[LoraFile], tmp_path: Path
) -> None:
    path = tmp_path / "state"
    descend(decoder, bank, examples(), np.zeros(3), SHORT, checkpoint=path)
    for texts, start, options in (
        (examples(4), np.zeros(3), SHORT),
        (examples(), np.ones(3), SHORT),
        (examples(), np.zeros(3), dataclasses.replace(SHORT, step=0.2)),
    ):
        with pytest.raises(EdgeLoRAError, match="another descent"):
            descend(decoder, bank, texts, start, options, checkpoint=path)


def test_damaged_states_are_refused() -> None:
    tracks = (begin(np.zeros(2)), begin(np.ones(2)))
    state = Checkpoint("k", tracks, (np.zeros(2), np.ones(2)), Tally(unit=3))
    data = state.to_bytes()
    back = from_bytes(data)
    assert back.to_bytes() == data and back.tally == state.tally and back.key == "k"
    uneven = dataclasses.replace(state, best=(np.zeros(2), np.zeros(3)))
    for bad in (b"", data[:-3], data.replace(b"n_steps", b"m_steps"), uneven.to_bytes()):
        with pytest.raises(InvalidFile, match="not a sound state"):
            from_bytes(bad)


# Factors


def test_polishing_lowers_the_loss(base: Path, decoder: Decoder, bank: list[LoraFile]) -> None:
    pairs = {pair.name: pair for pair in bank[0].pairs()}
    options = PolishOptions(n_passes=3, step=0.01, batch_size=2)
    found = polish(decoder, pairs, examples(4), options)
    before = mean_loss(decoder.losses(examples(4), pairs))
    assert mean_loss(decoder.losses(examples(4), found.pairs)) < before - 0.1
    assert list(found.pairs) == list(pairs) and found.n_passes == 3
    assert all(found.pairs[name].scale == pair.scale for name, pair in pairs.items())
    assert found.n_tokens == count_polish_tokens(decoder, examples(4), options)


def test_a_polish_step_by_hand(decoder: Decoder, bank: list[LoraFile]) -> None:
    pairs = {pair.name: pair for pair in bank[0].pairs()}
    variables = Factors(pairs)
    gradient, _ = variables.gradient(decoder, examples(), variables.start, PassOptions())
    found = polish(decoder, pairs, examples(), PolishOptions(n_passes=1, batch_size=0, step=0.01))
    expected = variables.updates(variables.start - np.float32(0.01) * np.sign(gradient))
    sure = variables.updates((abs(gradient) > 1e-9).astype(np.float32))
    for name, pair in expected.items():
        for part in ("lora_a", "lora_b"):
            mask = getattr(sure[name], part) > 0
            close = np.isclose(getattr(found.pairs[name], part), getattr(pair, part), atol=1e-5)
            assert close[mask].all()


def test_few_shot_lora_from_fresh_factors(base: Path, decoder: Decoder, tmp_path: Path) -> None:
    fresh = fresh_pairs(decoder.base, 3, ("attn_q", "ffn_down"), seed=4)
    assert sorted(fresh) == [f"blk.{i}.{p}.weight" for i in (0, 1) for p in ("attn_q", "ffn_down")]
    pair = fresh["blk.1.ffn_down.weight"]
    assert pair.lora_a.shape == (3, 64) and pair.lora_b.shape == (32, 3) and pair.scale == 2.0
    assert abs(pair.lora_a).max() <= 1 / 8 and not pair.lora_b.any()
    found = polish(decoder, fresh, examples(4), PolishOptions(n_passes=6, step=0.02))
    trained = mean_loss(decoder.losses(examples(4), found.pairs))
    assert trained < mean_loss(decoder.losses(examples(4), {})) - 0.1
    path = tmp_path / "few.gguf"
    plan = [PairPlan(p.name, 3, p.lora_a.shape[1], p.lora_b.shape[0]) for p in fresh.values()]
    write_lora(path, plan, found.pairs.values(), architecture="llama", alpha=None, dtype="f32")
    written = {p.name: p for p in open_lora(path).pairs()}
    assert mean_loss(decoder.losses(examples(4), written)) == pytest.approx(trained, rel=1e-5)


def test_polishing_goes_on_after_an_interrupt(
    decoder: Decoder, bank: list[LoraFile], tmp_path: Path
) -> None:
    pairs = {pair.name: pair for pair in bank[1].pairs()}
    options, path = PolishOptions(n_passes=2, batch_size=2), tmp_path / "state"
    whole = polish(decoder, pairs, examples(4), options)
    with pytest.raises(Interrupted) as caught:
        polish(decoder, pairs, examples(4), options, checkpoint=path, listen=Stop(3))
    assert caught.value.best.n_passes == 1
    found = polish(decoder, pairs, examples(4), options, checkpoint=path)
    for name, pair in whole.pairs.items():
        assert (found.pairs[name].lora_a == pair.lora_a).all()
        assert (found.pairs[name].lora_b == pair.lora_b).all()


def test_unusable_factors_are_refused(decoder: Decoder, bank: list[LoraFile]) -> None:
    pair = next(bank[0].pairs())
    wrong = {pair.name: dataclasses.replace(pair, lora_a=pair.lora_a[:, 1:])}
    with pytest.raises(IncompatibleAdapter, match="does not fit"):
        polish(decoder, wrong, examples())
    with pytest.raises(EdgeLoRAError, match="nothing to train"):
        polish(decoder, {}, examples())
    with pytest.raises(EdgeLoRAError, match="no tensors are named mlp"):
        fresh_pairs(decoder.base, 2, ("mlp",))
    with pytest.raises(EdgeLoRAError, match="rank 0"):
        fresh_pairs(decoder.base, 0, ("attn_q",))


def test_examples_are_not_touched(decoder: Decoder, bank: list[LoraFile]) -> None:
    texts: list[TokenisedExample] = examples(3)
    descend(decoder, bank, texts, np.zeros(3), dataclasses.replace(SHORT, n_passes=1))
    assert texts == examples(3)
