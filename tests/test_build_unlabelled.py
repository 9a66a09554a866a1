"""Builds without completions: by activations, by a description, by a calibrated bank."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import builds
import numpy as np
import pico
import pytest
from builds import World
from cli_runner import run

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.bank import Bank, Facts, open_bank
from edgelora.bank.adding import Request, add_many
from edgelora.bank.calibration import calibration_path, losses_path, read_calibration
from edgelora.bank.embedding import open_embedder
from edgelora.build import Built, Listener, Options, build, build_described
from edgelora.build.pool import open_pool
from edgelora.build.proposals import compare, propose
from edgelora.build.trials import SCALES
from edgelora.datasets.read import read_dataset
from edgelora.engine.model import Model, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.errors import BankError, DatasetError, EdgeLoRAError, InvalidFile, UnsupportedFile
from edgelora.gradient.activations import prompts_of, weigh_adapters
from edgelora.gradient.decoder import open_decoder
from edgelora.operators.heads import softmin

N_TASKS = 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    # Ten datasets of a few lines are all but linearly dependent: small lambdas take long there.
    monkeypatch.setattr("edgelora.operators.calibration.STRENGTHS", (1.0, 3.0))


@pytest.fixture
def unsigned(world: World, tmp_path: Path) -> Path:
    """The bank without any signature."""
    copy = tmp_path / "unsigned"
    shutil.copytree(world.bank, copy)
    for path in (copy / "adapters").glob("*.signature.safetensors"):
        path.unlink()
    return copy


def made(
    model: Model, bank: Path, data: Path, out: Path, heard: list[str] | None = None, **choices: Any
) -> Built:
    listener = Listener(warn=(heard if heard is not None else []).append)
    dataset, template = read_dataset(data), model_template(model)
    return build(model, open_bank(bank), dataset, template, out, Options(**choices), listener)


def provenance(path: Path) -> dict[str, Any]:
    account: dict[str, Any] = json.loads(str(open_lora(path).metadata["edgelora.provenance"]))
    return account


@pytest.mark.parametrize("operator", ["logo", "arrow"])
def test_activations_weigh_adapters_without_completions(
    operator: str, world: World, model: Model, tmp_path: Path
) -> None:
    out, heard = tmp_path / "a.gguf", []
    built = made(model, world.bank, world.unanswered, out, heard, operator=operator)
    assert built.chosen == operator and built.verdict is None
    assert any("activations alone decide" in message for message in heard)
    template = model_template(model)
    texts = tokenise_examples(model, template, read_dataset(world.unanswered).examples)
    pool = open_pool(open_bank(world.bank), model.base.identity, ())
    files = [open_lora(path) for path in pool.paths]
    rows = weigh_adapters(open_decoder(world.base), files, prompts_of(texts), operator)
    expected = np.mean([rows[name] for name in open_lora(out).names], axis=0)
    assert [built.coefficients[name] for name in pool.names] == pytest.approx(expected, rel=2e-3)
    account = provenance(out)
    assert (account["operator"], account["prompts"]) == (operator, 32)
    again = tmp_path / "again.gguf"
    result = run("build", "--from", out, "--bank", world.bank, "--base", world.base, "-o", again)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("operator", ["logo", "arrow"])
def test_with_completions_the_scale_is_tried_and_the_file_judged(
    operator: str, world: World, model: Model, tmp_path: Path
) -> None:
    out = tmp_path / "a.gguf"
    built = made(model, world.bank, world.helped, out, operator=operator, force=True)
    assert list(built.support_losses) == [operator] and built.judgement is not None
    scale = sum(built.coefficients.values())  # the weights themselves sum to 1
    assert min(abs(scale - tried) for tried in SCALES) < 2e-3
    assert operator == "logo" or scale > 1.2  # a file of its own, not the one that was tried


def test_adapters_without_signatures_will_do(
    world: World, model: Model, unsigned: Path, tmp_path: Path
) -> None:
    built = made(model, unsigned, world.unanswered, tmp_path / "a.gguf")
    assert built.chosen == "logo" and not built.distances
    with pytest.raises(EdgeLoRAError, match="needs signatures(.|\n)*logo, arrow"):
        made(model, unsigned, world.unanswered, tmp_path / "b.gguf", operator="mixture")


def test_a_base_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "phi.gguf", "phi3")
    bank = open_bank(tmp_path / "bank", create=True)
    bank.add(
        pico.write_peft(tmp_path / "phi", "phi3"), read_base(base), facts=Facts(template="alpaca")
    )
    data = builds.write_lines(tmp_path / "d.jsonl", ["is it?"] * 4)
    with open_model(base, builds.ONE_THREAD) as phi, pytest.raises(UnsupportedFile) as caught:
        template = model_template(phi, "alpaca")
        options = Options(operator="arrow")
        build(phi, bank, read_dataset(data), template, tmp_path / "o.gguf", options)
    assert "phi3" in str(caught.value) and "--operator mixture" in str(caught.value)


def test_a_budget_that_is_too_small_for_a_pass(world: World, model: Model, tmp_path: Path) -> None:
    with pytest.raises(EdgeLoRAError, match="the activations of 32 prompt"):
        made(model, world.bank, world.unanswered, tmp_path / "a.gguf", operator="logo",
             budget_tokens=20)  # fmt: skip


def described(world: World, model: Model, out: Path, text: str, **choices: Any) -> Built:
    options = replace(Options(distance="cosine"), **choices)
    bank, template = open_bank(world.bank), model_template(model)
    return build_described(model, bank, text, template, out, options)


def test_a_description_alone(world: World, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    text = "Say where the cat is."
    built = described(world, model, out, text)
    assert built.chosen == "attentional" and built.judgement is None
    assert sum(built.coefficients.values()) == pytest.approx(1.0, abs=1e-3)
    nearest = min(built.distances, key=lambda name: built.distances[name])
    assert max(built.coefficients, key=lambda name: built.coefficients[name]) == nearest
    account = provenance(out)
    assert (account["description"], account["distance"]) == (text, "cosine")
    assert any("nothing measures whether that helps" in message for message in built.warnings)
    alone = described(world, model, tmp_path / "b.gguf", text, operator="nearest")
    assert list(alone.coefficients) == [nearest]


@pytest.mark.parametrize(
    ("choices", "why"),
    [({"operator": "gibbs"}, "gibbs needs examples"), ({"operator": "logo"}, "logo needs examples"),
     ({"refine": "gradient"}, "no example to take gradients"), ({"polish": 2}, "no example")],
)  # fmt: skip
def test_a_description_is_no_example(
    choices: dict[str, Any], why: str, world: World, model: Model, tmp_path: Path
) -> None:
    with pytest.raises(EdgeLoRAError, match=why):
        described(world, model, tmp_path / "a.gguf", "Sort tickets.", **choices)


def test_a_description_needs_words_and_signatures(
    world: World, model: Model, unsigned: Path, tmp_path: Path
) -> None:
    for text in ("", "  \n", "x" * 2_001):
        with pytest.raises(DatasetError, match="no description"):
            described(world, model, tmp_path / "a.gguf", text)
    with pytest.raises(BankError, match="no adapter has a signature"):
        described(replace(world, bank=unsigned), model, tmp_path / "a.gguf", "Sort tickets.")


def test_a_description_as_a_person_types_it(world: World, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    words = ("build", "--base", world.base, "--bank", world.bank, "-o", out, "--threads", 1)
    result = run(*words, "--describe", "Say where the cat is.")
    assert result.exit_code == 0, result.output
    assert "distances from the description to the mean prompts of 4 adapters" in result.stderr
    assert "described as Say where the cat is." in run("show", out).stdout
    assert run(*words).exit_code == 2
    assert run(*words, "--describe", "x", "--data", world.helped).exit_code == 2


@pytest.fixture(scope="module")
def tasks(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bank of ten adapters from five sources in two categories, and the folder of their data."""
    folder = tmp_path_factory.mktemp("tasks")
    bank, requests = open_bank(folder / "bank", create=True), []
    for i in range(N_TASKS):
        peft = pico.write_peft(folder / f"t{i}", seed=i, size=1.0)
        place = "in the house" if i % 2 else "on the hill"
        prompts = [
            f"is {s} {place} {i + n}?" for n, (s, _) in enumerate(builds.subjects_and_places(4 + i))
        ]
        data = builds.write_lines(folder / f"t{i}.jsonl", prompts, ["yes", "no", "K"] * 5)
        facts = Facts(template="chat", source=f"s{i // 2}", category=f"c{i % 2}")
        requests.append(Request(peft, f"t{i}", data, facts))
    with (
        pytest.MonkeyPatch.context() as patch,
        open_embedder(world.base, n_threads=1) as embed,
    ):
        patch.setenv("EDGELORA_CACHE", str(folder / "cache"))
        add_many(bank, read_base(world.base), requests, embed=embed)
    return bank.path, folder


@pytest.fixture
def fresh(tasks: tuple[Path, Path], tmp_path: Path) -> Bank:
    """A copy of that bank that nothing was fitted on."""
    shutil.copytree(tasks[0], tmp_path / "bank")
    return open_bank(tmp_path / "bank")


def calibrated(bank: Bank, world: World, *more: object, code: int = 0) -> str:
    result = run("bank", "calibrate", "--bank", bank.path, "--base", world.base, "--threads", 1,
                 *more)  # fmt: skip
    assert result.exit_code == code, result.output
    return result.stdout + result.stderr


def test_a_bank_is_calibrated_by_its_categories_and_builds_use_it(
    fresh: Bank, world: World, model: Model, tmp_path: Path
) -> None:
    told = calibrated(fresh, world)
    assert "fitted on 10 datasets of the bank, by categories" in told and "softmin of bures" in told
    assert "peak memory: " in told
    base_id = model.base.identity.id
    stored = read_calibration(fresh, base_id)
    assert stored is not None and not stored.values.priors
    listed = run("bank", "ls", "--bank", fresh.path)
    assert "by categories of 10 datasets" in listed.stderr
    assert run("bank", "verify", "--bank", fresh.path).exit_code == 0

    pool = open_pool(fresh, model.base.identity, ())
    near = compare(pool, pool.others[0], "bures", 0)
    ((_, weights),) = propose(pool, near, None, "attentional")
    fit = stored.values.distances["bures"]
    assert weights == pytest.approx(softmin(near.distances, fit.temperature))
    plain = open_pool(fresh, model.base.identity, (), calibrated=False)
    ((_, usual),) = propose(plain, near, None, "attentional")
    assert weights != pytest.approx(usual)

    made(model, fresh.path, world.unanswered, tmp_path / "a.gguf", operator="attentional")
    assert provenance(tmp_path / "a.gguf")["calibrated on"] == "categories"
    made(model, fresh.path, world.unanswered, tmp_path / "b.gguf", calibrated=False)
    assert "calibrated on" not in provenance(tmp_path / "b.gguf")


def test_losses_are_measured_once_and_what_is_new_costs_its_own_passes(
    fresh: Bank, tasks: tuple[Path, Path], world: World, model: Model, tmp_path: Path
) -> None:
    data = ("--data-glob", f"{tasks[1]}/{{name}}.jsonl")
    poor = calibrated(fresh, world, *data, "--budget", 50, code=1)
    assert "the budget is 50" in poor and "--lines" in poor
    base_id = model.base.identity.id
    assert not losses_path(fresh, base_id).exists()
    told = calibrated(fresh, world, *data)
    assert "plan: 11 adapter(s), the base included" in told and "by losses" in told
    stored = read_calibration(fresh, base_id)
    assert stored is not None and len(stored.values.priors) == N_TASKS
    assert all(0 < prior < 1 for prior in stored.values.priors.values())
    before = losses_path(fresh, base_id).read_bytes()
    kept = json.loads(before)["losses"]
    assert set(kept["t0"]) == {f"t{i}" for i in range(2, N_TASKS)}  # not its sibling's, not its own

    assert "plan: 0 adapter(s)" in calibrated(fresh, world, *data)
    assert losses_path(fresh, base_id).read_bytes() == before
    less = json.loads(before)
    del less["losses"]["t3"], less["losses"]["t4"]["t9"]
    losses_path(fresh, base_id).write_text(json.dumps(less))
    assert "plan: 2 adapter(s)" in calibrated(fresh, world, *data)
    again = json.loads(losses_path(fresh, base_id).read_bytes())["losses"]
    for target, halves in kept["t3"].items():
        assert again["t3"][target] == pytest.approx(halves, abs=1e-4)

    fresh.remove("t9")
    heard: list[str] = []
    made(model, fresh.path, world.unanswered, tmp_path / "a.gguf", heard)
    assert any("another set of adapters" in message for message in heard)
    assert "so it is not used" in run("bank", "ls", "--bank", fresh.path).stderr


def test_priors_multiply_the_weights(
    fresh: Bank, tasks: tuple[Path, Path], world: World, model: Model
) -> None:
    calibrated(fresh, world, "--data-glob", f"{tasks[1]}/{{name}}.jsonl")
    pool = open_pool(fresh, model.base.identity, ())
    assert pool.calibration is not None
    priors = np.array([pool.calibration.priors[name] for name in pool.names])
    weights = np.arange(1.0, 11.0)
    found = pool.with_priors(weights)
    assert found == pytest.approx(55.0 * weights * priors / (weights @ priors))


def test_a_damaged_calibration_stops_a_build_and_is_found(
    fresh: Bank, world: World, model: Model, tmp_path: Path
) -> None:
    path = calibration_path(fresh, model.base.identity.id)
    path.write_text("{}")
    losses_path(fresh, model.base.identity.id).write_text("[1]")
    with pytest.raises(InvalidFile, match="not a sound calibration"):
        made(model, fresh.path, world.unanswered, tmp_path / "a.gguf")
    made(model, fresh.path, world.unanswered, tmp_path / "a.gguf", calibrated=False)
    found = run("bank", "verify", "--bank", fresh.path)
    assert found.exit_code == 1 and "not a sound calibration" in found.stdout
    assert "not a sound file of losses" in found.stdout
    assert "damaged: " in run("bank", "ls", "--bank", fresh.path).stderr


def test_too_small_a_bank_and_missing_data_are_said(
    fresh: Bank, world: World, tmp_path: Path
) -> None:
    small = run("bank", "calibrate", "--bank", world.bank, "--base", world.base)
    assert small.exit_code == 1 and "needs 8" in small.stderr
    assert "no dataset matches" in calibrated(fresh, world, "--data-glob", f"{tmp_path}/{{name}}",
                                              code=1)  # fmt: skip
    assert "one of wd" in calibrated(fresh, world, "--distance", "magic", code=2)
