"""What `--refine auto` comes to, the time that gradients keep to, and their builds repeated."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import builds
import pico
import pytest
from builds import World

from edgelora.adapters.base import read_base
from edgelora.bank import Bank, Facts, open_bank
from edgelora.build import (
    Built,
    Listener,
    Options,
    Plan,
    automatic,
    build,
    gradients,
    pace,
    samples,
)
from edgelora.build.earlier import BUILDS
from edgelora.build.records import DEFAULT_BUDGET
from edgelora.build.work import OPTIMISTIC, UNTOUCHED
from edgelora.datasets.read import read_dataset
from edgelora.engine.model import Model, open_model
from edgelora.engine.prepare import model_template
from edgelora.errors import EdgeLoRAError

AUTO = Options(passes=2, force=True)
INSTEAD = "coefficients come from the losses of forward passes"

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def plans() -> list[Plan]:
    return []


def run(
    model: Model, bank: Bank, data: Path, out: Path, options: Options, plans: list[Plan],
    template: str | None = None,
) -> Built:  # fmt: skip
    used = model_template(model, template)
    return build(model, bank, read_dataset(data), used, out, options, Listener(plans.append))


def test_gradients_where_they_can_be_had(
    world: World, model: Model, out: Path, plans: list[Plan]
) -> None:
    built = run(model, open_bank(world.bank), world.helped, out, AUTO, plans)
    (plan,) = plans
    assert built.refined is not None and plan.gradient is not None and not built.warnings
    assert plan.n_measured == 0 and not built.losses_alone
    assert plan.budget_tokens == DEFAULT_BUDGET and built.n_tokens <= DEFAULT_BUDGET
    other = replace(AUTO, refine="gradient")
    before = out.read_bytes()
    run(model, open_bank(world.bank), world.helped, out, other, plans)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (replace(AUTO, budget_tokens=4_000), r"one pass of gradients and its comparisons take"),
        (replace(AUTO, combine="linear"), "linear averages factors"),
        (replace(AUTO, limit_s=600.0), r"and its comparisons would take about \d+ min of 10"),
    ],
)
def test_losses_of_forward_passes_where_gradients_cannot_be_had_and_why(
    options: Options, why: str, world: World, model: Model, out: Path, plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(automatic, "measure_speed", lambda work, texts: 2.0)
    monkeypatch.setattr(pace, "measure_merge", lambda paths: 1.0)
    built = run(model, open_bank(world.bank), world.helped, out, options, plans)
    assert built.refined is None and built.losses_alone and plans[0].gradient is None
    assert plans[0].merge_s == pace.count_merges(7, is_crossed=False)  # of the seven it has now
    (told,) = [message for message in built.warnings if INSTEAD in message]
    assert re.search(why, told)


@pytest.mark.parametrize(
    ("n_lines", "n_kept", "options"),
    [
        (32, 8, replace(AUTO, budget_tokens=8_000)),
        (20, 16, replace(AUTO, limit_s=600.0)),
        (20, 8, replace(AUTO, limit_s=600.0)),
    ],
)
def test_gradients_learn_from_fewer_examples_where_all_take_too_long(
    n_lines: int, n_kept: int, options: Options, world: World, model: Model, out: Path,
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With 20 lines candidates are cross-validated, on no more than gradients learn from."""
    speed = {16: 6.0, 8: 3.5}[n_kept] if n_lines == 20 else math.inf
    monkeypatch.setattr(automatic, "_time_blocks", lambda *arguments: speed)
    monkeypatch.setattr(gradients, "_test_speed", lambda *arguments: speed)
    data = read_dataset(world.helped)
    data = replace(data, examples=data.examples[:n_lines])
    used = model_template(model)
    built = build(model, open_bank(world.bank), data, used, out, options, Listener(plans.append))
    (plan,), n_examples = plans, n_lines if n_lines < 24 else n_lines * 3 // 4
    assert built.refined is not None and built.refined.n_examples == n_kept
    assert plan.gradient is not None and plan.gradient.n_examples == n_kept
    told = f"gradients learn from {n_kept} of {n_examples} examples"
    assert sum(told in message for message in built.warnings) == 1
    if n_lines < 24:
        assert built.judgement is not None and built.judgement.n_examples == n_kept
        assert plan.n_support == n_kept


def test_a_base_without_known_gradients_is_named(
    world: World, out: Path, tmp_path: Path, plans: list[Plan]
) -> None:
    base = pico.write_base(tmp_path / "gpt2.gguf", "gpt2")
    bank = open_bank(tmp_path / "bank", create=True)
    peft = pico.write_peft(tmp_path / "peft", "gpt2", seed=0)
    bank.add(peft, read_base(base), name="one", facts=Facts(template="chat"))
    with open_model(base, builds.ONE_THREAD) as model:
        built = run(model, bank, world.helped, out, AUTO, plans, "Q: {prompt}\nA:")
    assert built.refined is None and set(built.losses_alone) == {"one"}
    assert any("gradients of gpt2" in m and INSTEAD in m for m in built.warnings)


@pytest.mark.parametrize("operator", ["mixture", "gibbs"])
def test_another_operator_takes_what_it_needs_and_nothing_is_said(
    operator: str, world: World, model: Model, out: Path, plans: list[Plan]
) -> None:
    options = replace(AUTO, operator=operator)
    built = run(model, open_bank(world.bank), world.helped, out, options, plans)
    assert built.refined is None and not built.warnings
    assert bool(built.losses_alone) == (operator == "gibbs")


def test_an_objective_is_one_of_gradients(
    world: World, model: Model, out: Path, plans: list[Plan]
) -> None:
    options = replace(AUTO, objective="prompts")
    built = run(model, open_bank(world.bank), world.unanswered, out, options, plans)
    assert built.refined is not None and built.refined.objective == "prompts"


@pytest.mark.parametrize(("tokens_per_s", "n_passes"), [(10.0**6, 9), (25.0, 4), (0.1, 1)])
def test_time_allows_fewer_passes_and_one_at_least(
    tokens_per_s: float, n_passes: int, world: World, model: Model, out: Path, plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gradients, "_test_speed", lambda *arguments: tokens_per_s)
    options = Options(refine="gradient", limit_s=600.0, passes=9, force=True)
    built = run(model, open_bank(world.bank), world.helped, out, options, plans)
    assert plans[0].gradient is not None and plans[0].gradient.n_passes == n_passes
    assert plans[0].n_shown == (8 if n_passes == 1 else 24)  # of 24; trying takes its share too
    told = [m for m in built.warnings if f"the time allows {n_passes} gradient pass(es) of 9" in m]
    assert len(told) == (n_passes < 9)


def test_a_repeated_build_combines_the_coefficients_that_gradients_found(
    world: World, model: Model, out: Path, plans: list[Plan], decoded: list[int]
) -> None:
    options, bank = replace(AUTO, reuse=True, passes=8), open_bank(world.bank)
    first = run(model, bank, world.helped, out, options, plans)
    before = out.read_bytes()
    assert first.chosen == "gradient" and decoded
    decoded.clear()
    second = run(model, bank, world.helped, out, options, plans)
    assert not decoded and second.n_tokens == 0 and out.read_bytes() == before
    assert plans[1].by == "an earlier build" and second.refined == first.refined
    assert plans[1].seconds == plans[1].merge_s > 0
    assert second.judgement == first.judgement and second.coefficients == first.coefficients
    (file,) = BUILDS.files()
    damaged = file.path.read_text().replace('"used": [0', '"used": [7')
    file.path.write_text(damaged)
    run(model, bank, world.helped, out, options, plans)
    assert decoded and out.read_bytes() == before


def test_what_was_interrupted_or_trained_is_not_repeated(
    world: World, model: Model, out: Path
) -> None:
    bank, options = open_bank(world.bank), replace(AUTO, reuse=True)
    interrupted = False

    def once(stage: str, done: int, total: int) -> None:
        nonlocal interrupted
        if "steps on coefficients" in stage and done == total and not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    ear = Listener(progress=once, keep=lambda question: True)
    used = model_template(model)
    build(model, bank, read_dataset(world.helped), used, out, options, ear)
    assert interrupted and not BUILDS.files()
    run(model, bank, world.helped, out, replace(options, polish=1), [])
    assert not BUILDS.files()


def test_linear_with_gradients_asked_for_is_refused(world: World, model: Model, out: Path) -> None:
    options = replace(AUTO, combine="linear", polish=1)
    with pytest.raises(EdgeLoRAError, match="linear averages factors"):
        run(model, open_bank(world.bank), world.helped, out, options, [])


def test_without_gradients_after_all_a_part_stays_untouched(
    world: World, model: Model, out: Path, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = open_bank(world.bank)
    first = run(model, bank, world.helped, out, AUTO, plans)
    monkeypatch.setattr(automatic, "_find_shortage", lambda *arguments: "too slow")
    second = run(model, bank, world.helped, out, AUTO, plans)
    parts = [b.judgement and (b.judgement.part, b.judgement.n_examples) for b in (first, second)]
    assert parts == [(OPTIMISTIC, 8), (UNTOUCHED, 8)]
    assert [(p.n_support, p.n_selection) for p in plans] == [(24, 8), (16, 8)]


@pytest.mark.parametrize("refine", ["auto", "forward"])
def test_of_many_examples_enough_are_compared(
    refine: str, world: World, model: Model, out: Path, tmp_path: Path, plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Comparing all 400 would take more than half of the budget."""
    monkeypatch.setattr(samples, "MAX_EXAMPLES", 16)
    lines = [json.loads(line) for line in world.helped.read_text().splitlines()]
    prompts = [f"{line['prompt']} {n}" for n in range(25) for line in lines]
    completions = [line["completion"] for _ in range(25) for line in lines]
    data = builds.write_lines(tmp_path / "many.jsonl", prompts, completions)
    options = replace(AUTO, refine=refine, budget_tokens=60_000)
    built = run(model, open_bank(world.bank), data, out, options, plans)
    (plan,) = plans
    assert (built.refined is None) == (refine == "forward")
    assert 16 <= plan.n_selection < 200 and plan.n_support == 400 and built.n_tokens <= 60_000
    assert built.judgement is not None and built.judgement.n_examples == plan.n_untouched
    told = f"compared on the {plan.n_untouched} shortest of 200 examples"
    assert any(told in message for message in built.warnings)
