"""Builds on a pico base: one adapter of its bank truly helps, for the answers were chosen so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import builds
import numpy as np
import pico
import pytest
from builds import HELPER, World

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.bank import Facts, open_bank
from edgelora.bank.records import signature_path
from edgelora.build import Built, Listener, Options, Plan, build, pace
from edgelora.build.clock import Clock
from edgelora.build.records import DEFAULT_BUDGET
from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Dataset, Example
from edgelora.datasets.split import split_examples
from edgelora.engine.context import open_context
from edgelora.engine.model import Model, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.engine.score import mean_loss, score
from edgelora.errors import (
    AlreadyExists,
    BankError,
    DatasetError,
    EdgeLoRAError,
    EngineError,
    NoImprovement,
)
from edgelora.signature import from_bytes

FORWARD = Options(refine="forward")
FORCED = replace(FORWARD, force=True)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a folder of temporary files that the test can look into."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


class Ear:
    """A listener that remembers, and interrupts at a stage if asked to."""

    def __init__(self, interrupt_at: str = "") -> None:
        self.plans: list[Plan] = []
        self.steps: list[tuple[str, int, int]] = []
        self.heard: list[str] = []
        self.interrupt_at = interrupt_at

    def progress(self, stage: str, done: int, total: int) -> None:
        self.steps.append((stage, done, total))
        if stage == self.interrupt_at and done:
            raise KeyboardInterrupt

    @property
    def listener(self) -> Listener:
        return Listener(self.plans.append, self.progress, self.heard.append)


def run(
    model: Model, bank: Path, data: Path | Dataset, out: Path, options: Options | None = None,
    ear: Ear | None = None, template: str | None = None,
) -> Built:  # fmt: skip
    dataset = data if isinstance(data, Dataset) else read_dataset(data)
    used = model_template(model, template)
    listener = (ear or Ear()).listener
    return build(model, open_bank(bank), dataset, used, out, options or FORWARD, listener)


def nothing_left(tmp_path: Path, but: Sequence[str] = ()) -> bool:
    """Neither beside the output nor among the temporary files."""
    left = [p.name for p in (tmp_path / "out").iterdir()]
    return sorted(left) == sorted(but) and not list((tmp_path / "tmp").iterdir())


def test_what_is_written_loads_helps_and_tells_how_it_was_made(
    world: World, model: Model, out: Path, tmp_path: Path
) -> None:
    ear = Ear()
    built = run(model, world.bank, world.helped, out, ear=ear)
    beside = signature_path(out, model.base.identity.id)
    assert built.out == out and nothing_left(tmp_path, [out.name, beside.name])
    kept = from_bytes(beside.read_bytes())
    assert (kept.prompt.n, kept.base_id) == (16, model.base.identity.id)  # of the support part

    judged = built.judgement
    assert judged is not None and judged.part == "untouched" and judged.n_examples == 8
    assert judged.adapter_loss < judged.base_loss - 0.5
    assert judged.interval[0] < judged.interval[1] < judged.interval[2]
    least = min(built.losses_alone, key=lambda name: built.losses_alone[name])
    assert least == HELPER and set(built.distances) == set(built.losses_alone)
    assert max(built.coefficients, key=lambda name: built.coefficients[name]) == HELPER

    lora = open_lora(out)
    told = json.loads(str(lora.metadata["edgelora.provenance"]))
    assert told["operator"] == built.chosen and told["distance"] == "bures"
    assert (told["seed"], told["budget_tokens"]) == (0, DEFAULT_BUDGET)
    coefficients = {s["name"]: s["coefficient"] for s in told["sources"]}
    assert coefficients == pytest.approx(built.coefficients)
    assert told["distances"] == pytest.approx(
        {name: built.distances[name] for name in coefficients}, abs=1e-6
    )
    assert {s["licence"] for s in told["sources"]} == {"MIT"} and told["base"]
    assert lora.metadata["edgelora.template"] == "chat"
    assert lora.metadata["edgelora.name"] == "built"

    (plan,) = ear.plans
    assert (plan.n_support, plan.n_selection, plan.n_untouched) == (16, 8, 8)
    assert plan.n_measured == plan.n_adapters == builds.N_ADAPTERS
    assert plan.n_tokens <= plan.budget_tokens and plan.merge_s > 0
    n_left = plan.n_tokens - plan.n_done
    assert plan.seconds == pytest.approx(n_left / plan.tokens_per_s + plan.merge_s)
    last = {stage: (done, total) for stage, done, total in ear.steps}
    assert {"embedding your examples", "measuring adapters", "trying candidates"} <= set(last)
    assert all(done == total for done, total in last.values())


def test_the_judgement_is_that_of_the_file(world: World, model: Model, out: Path) -> None:
    """With one selection and judged part (under 24 examples) the numbers can be taken again."""
    dataset = read_dataset(world.helped, limit=20)
    built = run(model, world.bank, dataset, out, replace(FORWARD, operator="halving"))
    assert built.judgement is not None and built.verdict is not None
    assert built.judgement.part == "selection part, optimistic"
    assert built.judgement.n_examples == 6
    assert built.judgement.base_loss == pytest.approx(built.verdict.base_loss, abs=1e-6)
    part = split_examples(dataset.examples, seed=0).selection
    again = loss_of(model, out, part)
    assert built.judgement.adapter_loss == pytest.approx(again, abs=1e-4)


def loss_of(model: Model, path: Path, part: Sequence[Example]) -> float:
    examples = tokenise_examples(model, model_template(model), part)
    with open_context(model) as context:
        context.apply([WeightedAdapter(path)])
        loss = mean_loss(score(context, examples))
        context.apply([])
        model.unload(path)
    return loss


def test_few_examples_are_all_used_and_cross_validated(
    world: World, model: Model, out: Path, decoded: list[int]
) -> None:
    dataset = read_dataset(world.helped, limit=16)
    ear = Ear()
    built = run(model, world.bank, dataset, out, ear=ear)
    assert sum(decoded) == built.n_tokens
    judged, verdict = built.judgement, built.verdict
    assert judged is not None and verdict is not None
    assert (judged.part, judged.n_examples) == ("cross-validated", 16)
    assert (ear.plans[0].n_support, ear.plans[0].n_selection) == (16, 0)
    (row,) = [row for row in verdict.table if row.name == built.chosen]
    assert judged.adapter_loss == pytest.approx(row.loss)
    # The file has seen all of the examples; what is told is the loss of those that had not.
    assert judged.adapter_loss < judged.base_loss
    assert loss_of(model, out, dataset.examples) < judged.adapter_loss + 0.02


@pytest.mark.parametrize("n", [2, 3, 7])
def test_very_few_examples_end_in_a_file_or_in_a_reason(
    n: int, world: World, model: Model, out: Path, tmp_path: Path
) -> None:
    dataset = read_dataset(world.helped, limit=n)
    built = run(model, world.bank, dataset, out, FORCED)
    assert built.judgement is not None and built.judgement.n_examples == n
    assert open_lora(out).names and not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
def test_answers_without_a_pattern_are_not_learnt_by_heart(
    world: World, model: Model, out: Path, tmp_path: Path
) -> None:
    """Coefficients fit these 12 answers, and others' no better than the base does."""
    lines = [json.loads(line) for line in world.helped.read_text().splitlines()[:12]]
    rng = np.random.default_rng(0)
    answers = [" ".join(rng.choice(list("bcdfgjklmpqrtvwxz"), 3)) for _ in lines]
    data = builds.write_lines(tmp_path / "d.jsonl", [e["prompt"] for e in lines], answers)
    built = run(model, world.bank, data, out, FORCED)
    assert built.verdict is not None
    fitted = [t for t in built.verdict.table if t.name.startswith("surrogate")]
    for row in fitted:
        assert row.loss > built.support_losses[row.name]


@pytest.mark.slow
def test_same_inputs_same_bytes_with_a_cold_and_a_warm_cache(
    world: World, model: Model, out: Path, decoded: list[int]
) -> None:
    first = run(model, world.bank, world.helped, out)
    cold, before = sum(decoded), out.read_bytes()
    assert cold == first.n_tokens
    decoded.clear()
    second = run(model, world.bank, world.helped, out, FORCED)
    assert sum(decoded) < cold
    assert second.n_tokens == first.n_tokens
    assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256(before).digest()
    with open_model(world.base, builds.ONE_THREAD) as another:
        run(another, world.bank, world.helped, out, FORCED)
    assert out.read_bytes() == before


@pytest.mark.slow
def test_another_seed_splits_otherwise(world: World, model: Model, out: Path) -> None:
    built = run(model, world.bank, world.helped, out, replace(FORWARD, seed=5))
    assert json.loads(str(open_lora(out).metadata["edgelora.provenance"]))["seed"] == 5
    assert built.judgement is not None


@pytest.mark.parametrize("budget", [3_600, 5_000, 8_000, 16_000])
def test_the_budget_is_kept(
    budget: int, world: World, model: Model, out: Path, decoded: list[int]
) -> None:
    ear = Ear()
    options = replace(FORWARD, budget_tokens=budget, force=True)
    built = run(model, world.bank, world.helped, out, options, ear)
    assert sum(decoded) == built.n_tokens <= budget
    assert ear.plans[0].n_tokens <= budget
    if budget < 16_000:
        assert any("every scale and step" in message for message in built.warnings)


def test_merges_are_counted_by_how_much_of_the_bank_they_sum() -> None:
    # Of auto's seven candidates: the mean of all, then mixture and three from losses; two steps
    # and the file that is written; and the three from losses for each of three folds.
    assert pace.count_merges(7, is_crossed=False) == 1 + (4 + 2 + 1) / 2
    assert pace.count_merges(7, is_crossed=True) == 1 + (4 + 2 + 1 + 9) / 2
    assert pace.count_merges(1, is_crossed=False) == 1 + (2 + 1) / 2


def slow_machine(monkeypatch: pytest.MonkeyPatch, tokens_per_s: float) -> Options:
    """Options for ten minutes on a machine of such a speed, as the short test finds it."""
    monkeypatch.setattr(pace, "measure_speed", lambda work, texts: tokens_per_s)
    return replace(FORWARD, limit_s=600.0, force=True)


def test_ten_minutes_of_a_slow_machine_are_its_budget(
    world: World, model: Model, out: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ear = Ear()
    built = run(model, world.bank, world.helped, out, slow_machine(monkeypatch, 11.5), ear)
    (plan,) = ear.plans
    assert plan.is_cut and plan.budget_tokens == 6_000 and plan.merge_s > 0
    assert sum(decoded) == built.n_tokens <= 6_000
    assert built.verdict is not None and len(built.verdict.table) == 3  # the best of seven
    names = list(built.support_losses)
    tried = [name for name in names if np.isfinite(built.support_losses[name])]
    assert len(tried) < 3 and {row.name for row in built.verdict.table} == {*tried, *names[-2:]}
    told = json.loads(str(open_lora(out).metadata["edgelora.provenance"]))
    assert told["budget_tokens"] == 6_000


def test_what_has_gone_by_is_not_spent_again(
    world: World, model: Model, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a large base and tests of speed may take minutes before the budget is set."""
    monkeypatch.setattr(Clock, "elapsed_s", property(lambda clock: 150.0))
    ear = Ear()
    run(model, world.bank, world.helped, out, slow_machine(monkeypatch, 11.5), ear)
    assert ear.plans[0].budget_tokens == 4_000  # of 540 s for passes 390 are left: 4,485


def test_a_build_takes_what_it_must_and_says_how_long(
    world: World, model: Model, out: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ear = Ear()
    built = run(model, world.bank, world.helped, out, slow_machine(monkeypatch, 0.5), ear)
    (plan,) = ear.plans
    assert plan.is_cut and 300 < sum(decoded) == built.n_tokens <= plan.budget_tokens
    assert any("at the very least: about" in message for message in built.warnings)
    assert any("the 6 shortest of 8 examples" in message for message in built.warnings)
    assert built.judgement is not None and built.judgement.n_examples == 6
    least = plan.budget_tokens
    out.unlink()
    few = read_dataset(world.helped, limit=16)
    crossed = run(model, world.bank, few, out, slow_machine(monkeypatch, 0.5))
    assert crossed.judgement is not None and crossed.judgement.n_examples == 6
    assert crossed.judgement.part == "cross-validated" and crossed.n_tokens < 2 * least


def test_the_speed_is_measured_and_a_fast_machine_keeps_its_budget(
    world: World, model: Model, out: Path, decoded: list[int]
) -> None:
    ear = Ear()
    built = run(model, world.bank, world.helped, out, replace(FORWARD, limit_s=600.0), ear)
    (plan,) = ear.plans
    assert not plan.is_cut and plan.budget_tokens == DEFAULT_BUDGET
    assert decoded[:4] == [16, 64, 64, 64]
    assert built.n_tokens == sum(decoded)  # the test is paid for
    assert plan.n_done > 208 and plan.n_done in np.cumsum(decoded)  # that and the embedding
    assert built.verdict is not None and len(built.verdict.table) > 3


def test_time_cuts_what_is_embedded_where_nothing_is_measured(
    world: World, model: Model, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ear = Ear()
    options = slow_machine(monkeypatch, 0.2)  # not one step of the budget: room for one text
    built = run(model, world.bank, world.unanswered, out, options, ear)
    assert ear.plans[0].is_cut and 10 < built.n_tokens <= ear.plans[0].budget_tokens < 100
    assert any("allows to embed" in message for message in built.warnings)


def test_a_small_budget_embeds_and_measures_less_and_says_so(
    world: World, model: Model, out: Path, tmp_path: Path, decoded: list[int]
) -> None:
    """Half of the lines are long, so that embedding all would take more than its share."""
    lines = [json.loads(line) for line in world.helped.read_text().splitlines()]
    prompts = [line["prompt"] + " in the house" * 20 * (i % 2) for i, line in enumerate(lines)]
    data = builds.write_lines(tmp_path / "d.jsonl", prompts, [e["completion"] for e in lines])
    ear = Ear()
    options = replace(FORWARD, budget_tokens=5_000, operator="nearest", force=True)
    built = run(model, world.bank, data, out, options, ear)
    assert sum(decoded) == built.n_tokens <= 5_000
    assert any("allows to embed" in message for message in built.warnings)
    assert ear.heard == list(built.warnings)
    assert ear.plans[0].n_shown < ear.plans[0].n_support


@pytest.mark.parametrize("budget", [1, 2_700, 3_000])
def test_a_budget_that_is_too_small_is_an_error_that_says_how_much(
    budget: int, world: World, model: Model, out: Path, tmp_path: Path, decoded: list[int]
) -> None:
    with pytest.raises(EdgeLoRAError, match=f"budget of {budget:,} tokens is too small.*takes"):
        run(model, world.bank, world.helped, out, replace(FORWARD, budget_tokens=budget))
    assert sum(decoded) <= budget and nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("data", "why"),
    [("hopeless", "nothing beats the base on the 8 examples of the selection part"),
     ("deceptive", "no better than the base on the 8 examples \\(untouched\\)")],
)  # fmt: skip
def test_nothing_is_written_when_nothing_helps(
    data: str, why: str, world: World, model: Model, out: Path, tmp_path: Path
) -> None:
    with pytest.raises(NoImprovement, match=why) as caught:
        run(model, world.bank, getattr(world, data), out)
    assert caught.value.exit_code == 3 and "--force" in str(caught.value)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("data", "why"),
    [("hopeless", "no candidate beat the base"), ("deceptive", "no better than the base")],
)
def test_force_publishes_what_does_not_help_and_warns(
    data: str, why: str, world: World, model: Model, out: Path, tmp_path: Path
) -> None:
    out.write_bytes(b"old")
    built = run(model, world.bank, getattr(world, data), out, FORCED)
    beside = signature_path(out, model.base.identity.id)
    assert open_lora(out).names and nothing_left(tmp_path, [out.name, beside.name])
    assert built.judgement is not None and built.coefficients
    assert built.judgement.adapter_loss >= built.judgement.base_loss
    assert any(why in message for message in built.warnings)


def test_an_existing_file_is_refused_and_untouched(
    world: World, model: Model, out: Path, decoded: list[int]
) -> None:
    out.write_bytes(b"mine")
    with pytest.raises(AlreadyExists, match="--force"):
        run(model, world.bank, world.helped, out)
    assert out.read_bytes() == b"mine" and not decoded


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["embedding your examples", "measuring adapters", "trying candidates",
              "comparing with the base"]
)  # fmt: skip
def test_an_interrupt_leaves_nothing_and_the_old_file(
    stage: str, world: World, model: Model, out: Path, tmp_path: Path
) -> None:
    out.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        run(model, world.bank, world.helped, out, FORCED, Ear(interrupt_at=stage))
    assert out.read_bytes() == b"old" and nothing_left(tmp_path, [out.name])
    built = run(model, world.bank, world.helped, out, FORCED)
    assert built.judgement is not None and open_lora(out).names


def test_excluded_adapters_take_no_part(world: World, model: Model, out: Path) -> None:
    built = run(model, world.bank, world.helped, out, replace(FORWARD, exclude=("*0", "adapter3")))
    assert set(built.losses_alone) == {"adapter1", "adapter2"}
    assert set(built.coefficients) <= {"adapter1", "adapter2"}
    with pytest.raises(BankError, match="no adapter is left"):
        run(model, world.bank, world.helped, out, replace(FORCED, exclude=("*",)))


def test_a_bank_for_another_base_names_both_identities(
    world: World, out: Path, tmp_path: Path
) -> None:
    tuned = pico.write_base(tmp_path / "tuned.gguf", norm_seed=7)
    with open_model(tuned, builds.ONE_THREAD) as other, pytest.raises(BankError) as caught:
        run(other, world.bank, world.helped, out)
    for path in (tuned, world.base):
        assert read_base(path).identity.describe() in str(caught.value)


@pytest.mark.parametrize(("operator", "chosen"), [("auto", "normalized"), ("nearest", "nearest")])
def test_without_completions_distances_decide(
    operator: str, chosen: str, world: World, model: Model, out: Path, decoded: list[int]
) -> None:
    ear = Ear()
    built = run(model, world.bank, world.unanswered, out, replace(FORWARD, operator=operator), ear)
    assert built.chosen == chosen and built.judgement is None and built.verdict is None
    assert any("no completions" in message for message in ear.heard)
    assert open_lora(out).names and built.distances and not built.losses_alone
    assert sum(decoded) == built.n_tokens > 0 and ear.plans[0].n_measured == 0


def test_without_completions_the_budget_is_kept(
    world: World, model: Model, out: Path, decoded: list[int]
) -> None:
    built = run(model, world.bank, world.unanswered, out, replace(FORWARD, budget_tokens=100))
    assert 0 < sum(decoded) == built.n_tokens <= 100
    assert any("allows to embed" in message for message in built.warnings)
    with pytest.raises(EdgeLoRAError, match="too small: embedding 1 example"):
        run(model, world.bank, world.unanswered, out, replace(FORCED, budget_tokens=2))


def test_an_operator_on_losses_needs_completions(world: World, model: Model, out: Path) -> None:
    with pytest.raises(EdgeLoRAError, match="surrogate needs completions"):
        run(model, world.bank, world.unanswered, out, replace(FORWARD, operator="surrogate"))


@pytest.mark.parametrize("what", ["operator", "distance"])
def test_unknown_names_are_refused(what: str, world: World, model: Model, out: Path) -> None:
    with pytest.raises(EdgeLoRAError, match=f"no {what} is named magic"):
        run(model, world.bank, world.helped, out, replace(FORWARD, **{what: "magic"}))


@pytest.fixture
def unsigned(world: World, tmp_path: Path) -> Path:
    """A bank of the world's adapters 0 to 2 with a signature for none but 0."""
    bank, source = open_bank(tmp_path / "unsigned", create=True), open_bank(world.bank)
    base = read_base(world.base)
    for i in range(3):
        peft = pico.write_peft(tmp_path / f"p{i}", seed=i, size=1.0)
        bank.add(peft, base, name=f"adapter{i}", facts=Facts(template="chat"))
    bank.set_signature("adapter0", source.signature("adapter0", base.identity.id))
    return bank.path


@pytest.mark.slow
def test_adapters_without_a_signature_are_named_and_still_measured(
    unsigned: Path, world: World, model: Model, out: Path
) -> None:
    built = run(model, unsigned, world.helped, out)
    (message,) = [m for m in built.warnings if "no signature" in m]
    assert "adapter1, adapter2" in message and "2 adapter(s)" in message
    assert set(built.distances) == {"adapter0"}
    assert set(built.losses_alone) == {"adapter0", "adapter1", "adapter2"}


def test_without_any_signature_losses_decide(
    unsigned: Path, world: World, model: Model, out: Path, decoded: list[int]
) -> None:
    options = replace(FORWARD, exclude=("adapter0",))
    stale = signature_path(out, model.base.identity.id)
    stale.write_bytes(b"of an adapter that this one replaces")
    built = run(model, unsigned, world.helped, out, options)
    assert not stale.exists()
    assert not built.distances and sum(decoded) == built.n_tokens
    assert {"nearest", "mixture"}.isdisjoint(built.support_losses)
    with pytest.raises(EdgeLoRAError, match="mixture needs signatures"):
        run(model, unsigned, world.helped, out, replace(options, operator="mixture", force=True))


def test_an_adapter_whose_loss_is_not_a_number_is_named(
    world: World, model: Model, out: Path, tmp_path: Path
) -> None:
    """Its factors are finite in the file; the states that they lead to are not."""
    bank, base = open_bank(tmp_path / "bank", create=True), read_base(world.base)
    for name, size in (("sound", 1.0), ("wild", 1e30)):
        peft = pico.write_peft(tmp_path / name, seed=1, size=size)
        bank.add(peft, base, name=name, dtype="f32")
    with pytest.raises(EngineError, match="not a number\n  - wild\n.*--exclude wild"):
        run(model, bank.path, world.helped, out)
    run(model, bank.path, world.helped, out, replace(FORWARD, exclude=("wild",)))


def test_another_template_is_said(world: World, model: Model, out: Path) -> None:
    built = run(model, world.bank, world.helped, out, FORCED, template="Q: {prompt}\nA:")
    assert any(
        f"{builds.N_ADAPTERS} adapter(s) were trained with another prompt template" in message
        for message in built.warnings
    )
    assert open_lora(out).metadata["edgelora.template"] == "Q: {prompt}\nA:"


def test_one_prompt_is_too_few(world: World, model: Model, out: Path, tmp_path: Path) -> None:
    data = builds.write_lines(tmp_path / "one.jsonl", ["is it?"] * 3, ["yes"] * 3)
    with pytest.raises(DatasetError, match="too few to measure"):
        run(model, world.bank, data, out)


@pytest.mark.parametrize(("combine", "rank"), [("cat", "auto"), ("svd", 2), ("linear", "auto")])
def test_how_to_combine_is_the_persons_choice(
    combine: str, rank: int | str, world: World, model: Model, out: Path
) -> None:
    options = replace(
        FORWARD, operator="uniform", combine=combine, rank=rank, dtype="f32", force=True
    )
    built = run(model, world.bank, world.helped, out, options)
    assert built.merge.method == combine and list(built.support_losses) == ["uniform mean"]
    assert built.merge.max_rank == {"cat": 16, "svd": 2, "linear": 4}[combine]


@pytest.mark.slow
def test_a_quantised_base_builds_as_well(world: World, out: Path, tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "q8.gguf", dtype="Q8_0")
    # low_ram: not every build of llama.cpp repacks Q8_0 rightly (see edgelora.engine.amx).
    with open_model(base, replace(builds.ONE_THREAD, low_ram=True)) as model:
        built = run(model, world.bank, world.helped, out)
    assert built.judgement is not None
    assert built.judgement.adapter_loss < built.judgement.base_loss
