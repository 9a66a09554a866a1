"""Builds by gradients on a pico base: coefficients, factors, budgets, interruption, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import builds
import numpy as np
import pico
import pytest
from builds import HELPER, World

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.adapters.merge import MergeReport
from edgelora.adapters.provenance import read_coefficients
from edgelora.bank import Facts, open_bank
from edgelora.bank.records import signature_path
from edgelora.build import Built, Listener, Options, Plan, build, gradients, refining, samples
from edgelora.build.crossing import assign_folds, part_of
from edgelora.build.records import CROSSED, PassLoss
from edgelora.build.work import OPTIMISTIC, UNTOUCHED
from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Dataset, Message
from edgelora.engine.model import Model, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.errors import EdgeLoRAError, NoImprovement, UnsupportedFile
from edgelora.gradient.decoder import open_decoder
from edgelora.gradient.descent import DescentOptions
from edgelora.gradient.polish import PolishOptions, fresh_pairs, polish

SHORT = Options(refine="gradient", passes=2, budget_tokens=10**6)
SCRATCH = Options(operator="none", polish=3, budget_tokens=10**6, rank=4)
ON_COEFFICIENTS = "gradient steps on coefficients, tokens"
ON_FACTORS = "gradient steps on factors, tokens"

pytestmark = pytest.mark.usefixtures("own_cache")


class Ear:
    """Remembers what it is told; may interrupt a stage at its n-th call, and keep the best."""

    def __init__(self, stage: str = "", n_calls: int = 0, *, keeps: bool = False) -> None:
        self.plans: list[Plan] = []
        self.passes: list[PassLoss] = []
        self.heard: list[str] = []
        self.asked: list[str] = []
        self.steps: list[tuple[str, int, int]] = []
        self.stage, self.n_calls, self.keeps = stage, n_calls, keeps

    def progress(self, stage: str, done: int, total: int) -> None:
        self.steps.append((stage, done, total))
        if stage == self.stage:
            self.n_calls -= 1
            if self.n_calls == 0:
                raise KeyboardInterrupt

    def keep(self, question: str) -> bool:
        self.asked.append(question)
        return self.keeps

    @property
    def listener(self) -> Listener:
        return Listener(
            self.plans.append, self.progress, self.heard.append, self.passes.append, self.keep
        )


def run(
    model: Model, world: World, data: Path, out: Path, options: Options = SHORT,
    ear: Ear | None = None,
) -> Built:  # fmt: skip
    used = model_template(model)
    listener = (ear or Ear()).listener
    return build(model, open_bank(world.bank), read_dataset(data), used, out, options, listener)


def told(path: Path) -> dict:
    return json.loads(str(open_lora(path).metadata["edgelora.provenance"]))


def test_coefficients_for_each_tensor_beat_the_start_and_are_told(
    world: World, model: Model, out: Path
) -> None:
    ear = Ear()
    options = replace(SHORT, passes=8, operator="uniform")
    built = run(model, world, world.helped, out, options, ear)
    assert built.chosen == "gradient" and set(built.support_losses) == {"uniform mean", "gradient"}
    assert built.support_losses["gradient"] < built.support_losses["uniform mean"] - 0.05
    judged = built.judgement
    assert judged is not None and judged.adapter_loss < judged.base_loss
    assert not built.losses_alone  # no pass for each adapter

    refined = built.refined
    assert refined is not None and refined.start.startswith("uniform mean x ")
    assert set(refined.slopes) == {f"adapter{i}" for i in range(builds.N_ADAPTERS)}
    assert refined.n_passes == int(np.argmin(refined.held_out_losses)) > 0
    assert refined.n_examples == 24 and refined.n_sources == builds.N_ADAPTERS
    assert [p.n_done for p in ear.passes] == list(range(len(refined.held_out_losses)))
    assert [p.held_out for p in ear.passes] == pytest.approx(refined.held_out_losses)
    assert np.isnan(ear.passes[0].support) and all(p.support > 0 for p in ear.passes[1:])

    account = told(out)
    assert account["operator"] == "gradient" and account["seed"] == 0
    assert account["refined"]["passes"] == refined.n_passes
    assert (account["refined"]["weights"], account["refined"]["objective"]) == ("component", "loss")
    means = {s["name"]: s["coefficient"] for s in account["sources"]}
    assert means == pytest.approx(built.coefficients, abs=1e-4)
    by_tensor = read_coefficients(account)
    of_helper = [value for row in by_tensor[HELPER].values() for value in row]
    assert set(by_tensor) == set(means) and len(set(of_helper)) == len(of_helper)
    assert not list(out.parent.glob("*.refine"))


def test_the_file_is_the_sum_that_its_provenance_tells(
    world: World, model: Model, out: Path
) -> None:
    options = replace(SHORT, operator="uniform", combine="cat", dtype="f32", force=True)
    built = run(model, world, world.helped, out, options)
    if built.chosen != "gradient":
        pytest.fail(f"{built.chosen} was chosen")
    sources = {r.name: open_lora(r.path) for r in open_bank(world.bank).records()}
    rows = read_coefficients(told(out))
    for pair in open_lora(out).pairs():
        exact = np.zeros((pair.lora_b.shape[0], pair.lora_a.shape[1]))
        for name, lora in sources.items():
            own = lora.pair(pair.name)
            weighted = own.lora_b.astype(np.float64) * rows[name][pair.name]
            exact += own.scale * weighted @ own.lora_a.astype(np.float64)
        np.testing.assert_allclose(pair.lora_b @ pair.lora_a, exact, atol=1e-4)


def test_same_inputs_same_bytes_and_the_budget_counts_what_was_computed(
    world: World, model: Model, out: Path, decoded: list[int]
) -> None:
    first = run(model, world, world.helped, out)
    before = out.read_bytes()
    assert sum(decoded) < first.n_tokens <= SHORT.budget_tokens
    second = run(model, world, world.helped, out, replace(SHORT, force=True))
    assert out.read_bytes() == before and second.n_tokens == first.n_tokens


def test_auto_compares_it_with_what_needs_no_losses_of_single_adapters(
    world: World, model: Model, out: Path
) -> None:
    ear = Ear()
    built = run(model, world, world.helped, out, ear=ear)
    assert set(built.support_losses) == {"uniform mean", "nearest", "mixture", "gradient"}
    (plan,) = ear.plans
    assert plan.n_measured == 0 and plan.gradient is not None
    g = plan.gradient
    assert (g.n_examples, g.n_passes, g.n_held_out, g.n_folds, g.n_polish) == (24, 2, 8, 0, 0)
    assert 0 < g.n_tokens < plan.n_tokens and g.tokens_per_s > 0 and plan.seconds > 0
    assert g.memory_bytes > 10**6 and not g.on_disk
    last = {stage: (done, total) for stage, done, total in ear.steps}
    assert ON_COEFFICIENTS in last and all(done == total for done, total in last.values())


def test_no_refinement_measures_no_adapter(world: World, model: Model, out: Path) -> None:
    built = run(model, world, world.helped, out, Options(refine="none", force=True))
    assert set(built.support_losses) == {"uniform mean", "nearest", "mixture"}
    assert not built.losses_alone and built.refined is None


@pytest.mark.parametrize(
    ("weights", "n_values"), [("component", 24), ("tensor", 6), ("layer", 2), ("adapter", 1)]
)
def test_weights_may_be_shared(
    weights: str, n_values: int, world: World, model: Model, out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two layers of three adapted matrices each, adapters of rank 4."""
    real, seen = refining.write_combination, []

    def spying(*arguments: Any) -> MergeReport:
        seen.append(arguments[-1].by_tensor)
        return real(*arguments)

    monkeypatch.setattr(refining, "write_combination", spying)
    options = replace(SHORT, operator="uniform", weights=weights, force=True, passes=6)
    built = run(model, world, world.helped, out, options)
    (by_tensor,) = seen
    assert len(by_tensor) == 6 and built.refined is not None and built.refined.n_passes > 0
    for i in range(builds.N_ADAPTERS):
        values = {c for row in by_tensor.values() for c in np.ravel(row[i])}
        assert n_values - 2 <= len(values) <= n_values  # two may be rounded to one float16
        if weights in ("layer", "adapter"):
            first = {row[i] for name, row in by_tensor.items() if name.startswith("blk.0.")}
            assert len(first) == 1


def test_a_large_bank_is_cut_to_the_steepest(
    world: World, model: Model, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refining, "MAX_SOURCES", 2)
    built = run(model, world, world.helped, out, replace(SHORT, operator="uniform", force=True))
    assert built.refined is not None and built.refined.n_sources == 2
    best = sorted(built.refined.slopes, key=lambda name: built.refined.slopes[name])[:2]
    if built.chosen == "gradient":
        assert set(built.coefficients) == set(best)


def test_many_examples_are_sampled(
    world: World, model: Model, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MAX_EXAMPLES", 5)
    ear = Ear()
    run(model, world, world.helped, out, replace(SHORT, force=True), ear)
    assert ear.plans[0].gradient is not None and ear.plans[0].gradient.n_examples == 5
    assert ear.plans[0].n_shown == 5 and ear.plans[0].n_support == 16


def test_the_blocks_inputs_go_to_a_file_where_memory_is_short(
    world: World, model: Model, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, world, world.helped, out)
    before = out.read_bytes()
    monkeypatch.setattr(gradients, "_SHARE_OF_FREE_MEMORY", 0.0)
    ear = Ear()
    run(model, world, world.helped, out, replace(SHORT, force=True), ear)
    assert ear.plans[0].gradient is not None and ear.plans[0].gradient.on_disk
    assert out.read_bytes() == before and not list(out.parent.glob("*.refine"))


# Many examples


WHOLE = replace(SHORT, operator="uniform", combine="cat", dtype="f32", force=True)


def many(world: World, n: int) -> Dataset:
    """The helped prompts again and again, each time begun with other words."""
    data = read_dataset(world.helped)
    made = []
    for i in range(n):
        example = data.examples[i % len(data.examples)]
        words = f"{'so ' * (i // len(data.examples))}{example.messages[0].content}"
        made.append(replace(example, messages=(Message("user", words),), line=i + 1))
    return replace(data, examples=tuple(made))


@pytest.mark.parametrize(
    ("n", "n_learned", "n_untouched", "part"),
    [(24, 18, 0, OPTIMISTIC), (64, 48, 0, OPTIMISTIC), (128, 64, 32, UNTOUCHED)],
)
def test_many_examples_stop_a_descent_and_the_others_are_learned_from(
    n: int, n_learned: int, n_untouched: int, part: str, world: World, model: Model, out: Path
) -> None:
    """The held-out loss is that of the selection part, all of which is held out below 128."""
    options, ear = replace(WHOLE, passes=2), Ear()
    data, used = many(world, n), model_template(model)
    built = build(model, open_bank(world.bank), data, used, out, options, ear.listener)
    (plan,) = ear.plans
    assert plan.gradient is not None and built.refined is not None
    assert (plan.n_support, plan.n_untouched) == (n - n // 4 - n_untouched, n_untouched)
    g = plan.gradient
    assert (g.n_examples, g.n_held_out, g.n_folds) == (n_learned, min(n // 4, 16), 0)
    assert built.judgement is not None and built.judgement.part == part
    if n < 128:
        assert built.chosen == "gradient" and built.judgement.n_examples == n // 4
        loss = built.refined.held_out_losses[built.refined.n_passes]
        assert built.judgement.adapter_loss == pytest.approx(loss, rel=2e-3)


def test_without_gradients_an_untouched_part_stays(world: World, model: Model, out: Path) -> None:
    options, used = replace(SHORT, refine="none", force=True), model_template(model)
    built = build(model, open_bank(world.bank), many(world, 64), used, out, options)
    assert built.judgement is not None
    assert (built.judgement.part, built.judgement.n_examples) == (UNTOUCHED, 16)


# Few examples


def few(world: World, n: int = 12) -> Dataset:
    data = read_dataset(world.helped)
    return replace(data, examples=data.examples[:n])


def test_few_examples_are_all_learned_from_and_cross_validated(
    world: World, model: Model, out: Path
) -> None:
    """The arbiter's losses, by llama.cpp, are those that the descent's folds were held out with."""
    ear = Ear()
    built = build(
        model, open_bank(world.bank), few(world), model_template(model), out, WHOLE, ear.listener
    )
    refined, judged, verdict = built.refined, built.judgement, built.verdict
    assert refined is not None and judged is not None and verdict is not None
    assert refined.n_examples == 12 and built.chosen == "gradient"
    assert (judged.part, judged.n_examples) == (CROSSED, 12)
    rows = {row.name: row.loss for row in verdict.table}
    assert rows["gradient"] == pytest.approx(judged.adapter_loss)
    assert rows["gradient"] == pytest.approx(refined.held_out_losses[refined.n_passes], rel=2e-3)
    assert built.support_losses["gradient"] < rows["gradient"]  # what has been seen flatters
    assert built.n_tokens <= WHOLE.budget_tokens
    assert {p.name for p in out.parent.iterdir()} == {
        out.name, signature_path(out, model.base.identity.id).name
    }  # fmt: skip


@pytest.mark.parametrize(("budget", "n_folds"), [(10**6, 4), (12_000, 2)])
def test_four_folds_where_the_budget_allows_them_enough_passes(
    budget: int, n_folds: int, world: World, model: Model, out: Path
) -> None:
    options, ear = replace(WHOLE, passes=9, budget_tokens=budget), Ear()
    built = build(
        model, open_bank(world.bank), few(world), model_template(model), out, options, ear.listener
    )
    (plan,) = ear.plans
    assert plan.gradient is not None and plan.gradient.n_folds == n_folds
    assert plan.gradient.n_passes >= 3 and built.n_tokens <= budget


def test_what_is_trained_on_few_examples_is_judged_by_those_it_has_not_seen(
    world: World, model: Model, out: Path
) -> None:
    """The arbiter's loss of a LoRA from scratch is that of those trained without each fold."""
    data, options = few(world), replace(SCRATCH, force=True)
    built = build(model, open_bank(world.bank), data, model_template(model), out, options)
    assert built.verdict is not None and built.judgement is not None
    assert built.judgement.part == CROSSED and built.trained is not None
    assert built.trained.n_examples == 12 and built.n_tokens <= options.budget_tokens
    decoder = open_decoder(world.base)
    examples = tokenise_examples(model, model_template(model), data.examples)
    modules = sorted({name.split(".")[2] for name in open_lora(out).names})
    fresh, folds, nll = fresh_pairs(decoder.base, 4, modules), assign_folds(examples), 0.0
    for fold in range(3):
        seen, unseen = part_of(examples, folds != fold), part_of(examples, folds == fold)
        assert len(seen) == 8
        found = polish(decoder, fresh, seen, PolishOptions(n_passes=SCRATCH.polish))
        nll += sum(s.nll for s in decoder.losses(unseen, found.pairs))
    n_tokens = sum(len(example.completion) for example in examples)
    (row,) = built.verdict.table
    assert row.loss == pytest.approx(nll / n_tokens, rel=2e-3)
    assert built.support_losses["few-shot LoRA"] < row.loss  # what has been seen flatters


@pytest.mark.parametrize(
    ("operator", "refine"), [("auto", "gradient"), ("mixture", "none"), ("gibbs", "forward")]
)
def test_factors_of_few_examples_begin_with_what_was_found_without_each_fold(
    operator: str, refine: str, world: World, model: Model, out: Path
) -> None:
    options, ear = replace(WHOLE, operator=operator, refine=refine, polish=2), Ear()
    built = build(
        model, open_bank(world.bank), few(world), model_template(model), out, options, ear.listener
    )
    assert built.verdict is not None and built.trained is not None
    rows, name = {row.name: row for row in built.verdict.table}, built.trained.start
    polished = rows[f"{name}, polished"]
    assert math.isfinite(polished.loss) and polished.loss != rows[name].loss
    assert built.support_losses[f"{name}, polished"] < built.support_losses[name]
    assert built.support_losses[f"{name}, polished"] < polished.loss
    stages = [step for step in ear.steps if step[0] == ON_FACTORS]
    assert stages == sorted(stages) and stages[-1][1] == stages[-1][2]
    assert [p.stage for p in ear.passes].count("factors") in (2 * (1 + 4), 2 * (1 + 3))
    assert built.n_tokens <= options.budget_tokens


# Budgets


def test_a_budget_allows_fewer_passes_and_says_so(world: World, model: Model, out: Path) -> None:
    ear = Ear()
    options = replace(SHORT, passes=50, budget_tokens=60_000, force=True)
    built = run(model, world, world.helped, out, options, ear)
    assert ear.plans[0].gradient is not None
    n_passes = ear.plans[0].gradient.n_passes
    assert 1 <= n_passes < 50 and built.n_tokens <= 60_000
    assert any(f"allows {n_passes} gradient pass(es) of 50" in message for message in ear.heard)


@pytest.mark.parametrize("options", [SHORT, SCRATCH])
def test_a_budget_too_small_for_a_pass_says_how_much_one_takes(
    options: Options, world: World, model: Model, out: Path
) -> None:
    with pytest.raises(EdgeLoRAError, match="too small: .* pass.* takes [0-9,]+ and"):
        run(model, world, world.helped, out, replace(options, budget_tokens=4_000))
    assert not list(out.parent.iterdir())


# Interruption


@pytest.mark.parametrize("keeps", [False, True])
def test_an_interrupt_keeps_the_state_and_the_same_build_ends_with_the_same_bytes(
    keeps: bool, world: World, model: Model, out: Path, tmp_path: Path
) -> None:
    options = replace(SHORT, passes=4, force=True)
    n_units = 1 + 24 // DescentOptions().batch_size  # a look at what is held out, and the steps
    whole = tmp_path / "whole.gguf"
    run(model, world, world.helped, whole.with_name(out.name), options)
    ear = Ear(ON_COEFFICIENTS, n_units + 2, keeps=keeps)
    if keeps:
        built = run(model, world, world.helped, out, options, ear)
        assert built.refined is not None and len(built.refined.held_out_losses) == 2
        assert "best so far" in ear.asked[0] and not list(out.parent.glob("*.refine"))
        return
    with pytest.raises(KeyboardInterrupt):
        run(model, world, world.helped, out, options, ear)
    (folder,) = out.parent.iterdir()
    assert folder.name == "built.gguf.refine" and len(list(folder.iterdir())) == 1
    assert any("the same command goes on" in message for message in ear.heard)
    again = Ear()
    run(model, world, world.helped, out, options, again)
    assert again.passes[0].n_done > 0  # the start was judged before the interruption
    assert out.read_bytes() == whole.with_name(out.name).read_bytes()
    assert not list(out.parent.glob("*.refine"))


def test_a_state_of_other_examples_is_not_taken(world: World, model: Model, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, world, world.helped, out, SHORT, Ear(ON_COEFFICIENTS, 8))
    ear = Ear()
    run(model, world, world.helped, out, replace(SHORT, seed=3, force=True), ear)
    assert ear.passes[0].n_done == 0


def test_nothing_that_helps_keeps_the_state_for_force(
    world: World, model: Model, out: Path
) -> None:
    ear = Ear()
    with pytest.raises(NoImprovement):
        run(model, world, world.hopeless, out, SHORT, ear)
    assert [p.name for p in out.parent.iterdir()] == ["built.gguf.refine"]
    again = Ear()
    run(model, world, world.hopeless, out, replace(SHORT, force=True), again)
    assert not again.passes and not list(out.parent.glob("*.refine"))


# Factors


def test_polishing_trains_the_best_candidate(world: World, model: Model, out: Path) -> None:
    ear = Ear()
    options = Options(operator="nearest", refine="none", polish=6, budget_tokens=10**6)
    built = run(model, world, world.helped, out, replace(options, force=True), ear)
    assert set(built.support_losses) == {"nearest", "nearest, polished"}
    assert built.support_losses["nearest, polished"] < built.support_losses["nearest"]
    trained = built.trained
    assert trained is not None and (trained.start, trained.n_passes) == ("nearest", 6)
    assert [p.stage for p in ear.passes] == ["factors"] * 6
    assert [p.support for p in ear.passes] == pytest.approx(trained.support_losses, rel=0.05)
    account = told(out)
    assert built.chosen == "nearest, polished"
    exact = pytest.approx(0.0, abs=1e-6)  # one adapter, at its own rank
    trained = {"from": "nearest", "examples": 24, "passes": 6, "error before": exact}
    assert account["trained"] == trained and "error" not in account
    assert all(set(tensor) == {"rank"} for tensor in account["tensors"].values())
    assert account["operator"] == "nearest, polished" and len(account["sources"]) == 1


def test_few_shot_lora_from_scratch(world: World, model: Model, out: Path) -> None:
    built = run(model, world, world.helped, out, replace(SCRATCH, force=True))
    assert built.chosen == "few-shot LoRA" and built.merge is None and not built.coefficients
    lora = open_lora(out)
    assert {lora.rank(name) for name in lora.names} == {4}
    bank_names = {n for r in open_bank(world.bank).records() for n in open_lora(r.path).names}
    assert set(lora.names) == bank_names
    account = told(out)
    assert account["sources"] == [] and account["trained"]["from"] == "scratch"
    assert lora.metadata["edgelora.base.id"] == read_base(world.base).identity.id
    assert "edgelora.licence" not in lora.metadata and lora.metadata["edgelora.name"] == "built"
    trained = built.trained
    assert trained is not None and trained.support_losses[-1] < trained.support_losses[0]


def test_an_interrupted_polish_goes_on(world: World, model: Model, out: Path) -> None:
    options = replace(SCRATCH, force=True)
    n_steps = 24 // PolishOptions().batch_size
    run(model, world, world.helped, out, options)
    before = out.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(model, world, world.helped, out, options, Ear(ON_FACTORS, n_steps + 1))
    assert out.read_bytes() == before and list(out.parent.glob("*.refine"))
    ear = Ear()
    run(model, world, world.helped, out, options, ear)
    assert ear.passes[0].n_done > 1 and out.read_bytes() == before


def test_gradient_then_polish(world: World, model: Model, out: Path) -> None:
    built = run(model, world, world.helped, out, replace(SHORT, polish=2, force=True))
    best = min((n for n in built.support_losses if "polished" not in n),
               key=lambda n: built.support_losses[n])  # fmt: skip
    assert built.trained is not None and built.trained.start == best
    assert f"{best}, polished" in built.support_losses


# Without completions


@pytest.mark.parametrize("objective", ["", "prompts", "entropy"])
def test_objectives_without_completions(
    objective: str, world: World, model: Model, out: Path
) -> None:
    ear = Ear()
    built = run(model, world, world.unanswered, out, replace(SHORT, objective=objective), ear)
    assert built.chosen == "gradient" and built.judgement is None
    assert built.refined is not None and built.refined.objective == (objective or "prompts")
    assert any("nothing measures whether answers get better" in m for m in ear.heard)
    assert ear.plans[0].gradient is not None and ear.plans[0].n_tokens <= SHORT.budget_tokens
    assert told(out)["refined"]["objective"] == built.refined.objective


@pytest.mark.parametrize(
    ("options", "why"),
    [(replace(SHORT, polish=1), "--polish learns them"),
     (replace(SHORT, objective="loss"), "the objective loss needs them")],
)  # fmt: skip
def test_what_needs_completions_is_refused(
    options: Options, why: str, world: World, model: Model, out: Path
) -> None:
    with pytest.raises(EdgeLoRAError, match=why):
        run(model, world, world.unanswered, out, options)


# Refusals


@pytest.mark.parametrize(
    ("options", "why"),
    [(Options(operator="none"), "combines nothing"),
     (replace(SHORT, operator="none", polish=1), "combines nothing"),
     (replace(SHORT, combine="linear"), "linear averages factors"),
     (Options(refine="forward", objective="entropy"), "an objective is for gradients"),
     (Options(refine="magic"), "no refinement is named magic"),
     (replace(SHORT, weights="magic"), "no kind of weights is named magic"),
     (replace(SHORT, objective="magic"), "no objective is named magic")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(
    options: Options, why: str, world: World, model: Model, out: Path
) -> None:
    with pytest.raises(EdgeLoRAError, match=why):
        run(model, world, world.helped, out, options)


@pytest.mark.parametrize("options", [SHORT, SCRATCH])
def test_an_architecture_without_gradients_is_named_before_anything_is_computed(
    options: Options, world: World, out: Path, tmp_path: Path, decoded: list[int]
) -> None:
    base = pico.write_base(tmp_path / "gpt2.gguf", "gpt2")
    bank = open_bank(tmp_path / "bank", create=True)
    peft = pico.write_peft(tmp_path / "peft", "gpt2", seed=0)
    bank.add(peft, read_base(base), name="one", facts=Facts(template="chat"))
    with open_model(base, builds.ONE_THREAD) as model:
        used = model_template(model, "Q: {prompt}\nA:")
        with pytest.raises(UnsupportedFile, match="gradients of gpt2.*\n.*--refine forward"):
            build(model, bank, read_dataset(world.helped), used, out, options)
    assert not decoded and not list(out.parent.iterdir())
