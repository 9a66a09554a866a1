"""`edgelora build --from`: builds repeated from what their files record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
from builds import World
from cli_runner import run

from edgelora.adapters import krylov, terms
from edgelora.adapters.gguf_lora import LoraFile, open_lora, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.adapters.merge import merge_adapters
from edgelora.adapters.recipe import read_recipe
from edgelora.bank import open_bank
from edgelora.build.repeat import relative_difference
from edgelora.errors import InvalidFile

pytestmark = pytest.mark.usefixtures("own_cache")


def build(world: World, out: Path, *more: object) -> Path:
    result = run("build", "--base", world.base, "--bank", world.bank, "--data", world.helped,
                 "-o", out, "--threads", 1, "-q", *more)  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def again(world: World, recorded: Path, *more: object, bank: Path | None = None) -> Any:
    out = recorded.with_name("again.gguf")
    return run("build", "--from", recorded, "--base", world.base, "--bank", bank or world.bank,
               "-o", out, *more)  # fmt: skip


def sources(world: World) -> list[Path]:
    return [record.path for record in open_bank(world.bank).records()]


def rewritten(path: Path, world: World, account: object) -> Path:
    """A combination whose account is another one."""
    facts = {"edgelora.provenance": json.dumps(account)}
    return pico.write_random_lora(path, world.base, metadata=facts)


def account_of(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(str(open_lora(path).metadata["edgelora.provenance"]))
    return told


FORWARD = ("--refine", "forward")
GRADIENT = ("--refine", "gradient", "--passes", 8, "--operator", "uniform")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(FORWARD, marks=pytest.mark.slow),
        pytest.param((*FORWARD, "--rank", 2, "--type", "f32"), marks=pytest.mark.slow),
        pytest.param((*FORWARD, "--combine", "cat"), marks=pytest.mark.slow),
        GRADIENT,
        pytest.param((*GRADIENT, "--weights", "tensor"), marks=pytest.mark.slow),
    ],
    ids=["forward", "rank 2", "cat", "components", "tensors"],
)
def test_a_build_repeated_has_the_same_bytes(
    options: tuple[object, ...], world: World, tmp_path: Path
) -> None:
    recorded = build(world, tmp_path / "built.gguf", *options, "--force")
    result = again(world, recorded)
    assert result.exit_code == 0, result.output
    out = tmp_path / "again.gguf"
    assert out.read_bytes() == recorded.read_bytes()
    sha256 = open_lora(recorded).sha256
    assert result.stdout == f"{out}: the same bytes as {recorded}\nsha256 {sha256}\n"
    refused = again(world, recorded)
    assert refused.exit_code == 1 and "--force" in refused.stderr
    told = json.loads(again(world, recorded, "--force", "--json").stdout)
    assert told["same_bytes"] and told["header"] == [] and told["tensors"] == []
    assert told["coefficients_rounded"] == (options[: len(GRADIENT)] == GRADIENT)


@pytest.mark.parametrize("options", [{"method": "linear"}, {"dtype": "bf16", "scale": 0.3}])
def test_what_a_library_call_merged(options: dict[str, Any], world: World, tmp_path: Path) -> None:
    recorded = tmp_path / "merged.gguf"
    merge_adapters(sources(world)[:3], [0.7, -0.123456789, 0.0], recorded, **options)
    assert len(account_of(recorded)["sources"]) == 2
    assert again(world, recorded).exit_code == 0
    assert (tmp_path / "again.gguf").read_bytes() == recorded.read_bytes()


def test_a_sum_of_more_ranks_than_the_matrices_have(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Krylov spaces, as for hundreds of adapters: the bound is recorded and comes back too."""
    for name, value in {"SMALL": 8, "EXTRA": 2, "FIRST_CHECK": 1, "TOLERANCE": 0.5}.items():
        monkeypatch.setattr(krylov, name, value)
    monkeypatch.setattr(terms, "DENSE_SHARE", 0.1)
    recorded = tmp_path / "merged.gguf"
    report = merge_adapters(sources(world), [0.4, 0.3, 0.2, 0.1], recorded, rank=1)
    tensors = account_of(recorded)["tensors"].values()
    assert any("excess" in tensor for tensor in tensors) and report.excess > 0
    assert again(world, recorded).exit_code == 0
    assert (tmp_path / "again.gguf").read_bytes() == recorded.read_bytes()


def test_a_tensor_that_cancelled_and_one_without_coefficients(world: World, tmp_path: Path) -> None:
    """`cancelled` and left-out tensors come back as they were, not as zeros or as updates."""
    paths = sources(world)[:2]
    names = open_lora(paths[0]).names
    rows = {name: [0.5, 0.25] for name in names}
    rows[names[0]] = [0.0, 0.0]
    recorded = tmp_path / "left-out.gguf"
    merge_adapters(paths, rows, recorded)
    assert names[0] not in open_lora(recorded).plan
    assert again(world, recorded).exit_code == 0

    bank = tmp_path / "bank"
    shutil.copytree(world.bank, bank)
    known = {k: v for k, v in open_lora(paths[0]).metadata.items() if k.startswith("edgelora.")}
    files = [bank / "adapters" / f"{name}.gguf" for name in ("one", "two", "other")]
    for path, layer in zip(files, (0, 0, 1), strict=True):  # one and two hold the same values
        facts = known | {"edgelora.name": path.stem}
        pico.write_random_lora(path, world.base, layers=[layer], metadata=facts)
    merge_adapters(files, [0.5, -0.5, 1.0], recorded, provenance={"seed": 3}, force=True)
    assert len(account_of(recorded)["cancelled"]) == 3
    assert again(world, recorded, "--force", bank=bank).exit_code == 0


def test_coefficients_for_each_component(world: World, tmp_path: Path) -> None:
    """Of sources of ranks 2 and 4 and one that has the same everywhere."""
    bank = tmp_path / "bank"
    shutil.copytree(world.bank, bank)
    paths = sources(world)
    known = {k: v for k, v in open_lora(paths[0]).metadata.items() if k.startswith("edgelora.")}
    low = pico.write_random_lora(bank / "adapters" / "low.gguf", world.base, rank=2,
                                 metadata=known | {"edgelora.name": "low"})  # fmt: skip
    files = [paths[0], low, paths[1]]
    drawn = np.random.default_rng(0).normal(size=(len(open_lora(low).names), 3, 4))
    rows = dict(zip(open_lora(low).names, drawn.astype(np.float16).astype(float), strict=True))
    for row in rows.values():
        row[2] = 0.3
    recorded = tmp_path / "merged.gguf"
    merge_adapters(files, rows, recorded, dtype="f32")
    result = again(world, recorded, bank=bank)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.gguf").read_bytes() == recorded.read_bytes()

    account = account_of(recorded)
    account["sources"][0]["coefficients"] = account["sources"][1]["coefficients"]
    short = again(world, rewritten(tmp_path / "bad.gguf", world, account), "--force", bank=bank)
    assert short.exit_code == 1 and "2 coefficients for 4 components of" in short.stderr


def test_rounded_coefficients_are_told_with_the_largest_difference(
    world: World, tmp_path: Path
) -> None:
    paths = sources(world)[:2]
    names = open_lora(paths[0]).names
    rows = {name: [0.1 + 0.0313 * i, 0.77] for i, name in enumerate(names)}
    recorded = tmp_path / "merged.gguf"
    merge_adapters(paths, rows, recorded, method="cat", dtype="f32")
    result = again(world, recorded)
    assert result.exit_code == 1, result.output
    assert "not the same bytes" in result.stdout and "recorded as float16" in result.stderr
    told = json.loads(again(world, recorded, "--force", "--json").stdout)
    assert not told["same_bytes"] and told["coefficients_rounded"]
    files = [open_lora(path) for path in (recorded, tmp_path / "again.gguf")]
    wanted = {name: dense_difference(files, name) for name in names}
    found = {tensor["name"]: tensor["relative"] for tensor in told["tensors"]}
    assert found == pytest.approx({k: v for k, v in wanted.items() if k in found}, rel=1e-3)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert 1e-6 < max(found.values()) < 1e-3
    assert f"{max(found.values()):.2g} of the update's norm" in result.stdout


def dense(pair: LoraPair) -> np.ndarray:
    return pair.scale * (pair.lora_b.astype(np.float64) @ pair.lora_a.astype(np.float64))


def dense_difference(files: list[LoraFile], name: str) -> float:
    then, now = (dense(file.pair(name)) for file in files)
    return float(np.linalg.norm(now - then) / np.linalg.norm(then))


def test_a_difference_by_hand_and_against_dense_matrices() -> None:
    one = np.ones((1, 2), np.float32)
    pair = LoraPair("x", one, one.T, 2.0)  # every entry is 2
    assert relative_difference(pair, LoraPair("x", one, one.T, 3.0)) == pytest.approx(0.5)
    flipped = LoraPair("x", -one, -one.T, 2.0)
    assert relative_difference(pair, flipped) == 0.0
    rng = np.random.default_rng(0)
    first, second = (
        LoraPair("x", rng.standard_normal((r, 7), dtype=np.float32),
                 rng.standard_normal((5, r), dtype=np.float32), 1.5)
        for r in (2, 3)
    )  # fmt: skip
    wanted = np.linalg.norm(dense(second) - dense(first)) / np.linalg.norm(dense(first))
    assert relative_difference(first, second) == pytest.approx(float(wanted), rel=1e-6)
    nothing = LoraPair("x", one, 0 * one.T, 1.0)
    assert relative_difference(nothing, nothing) == 0.0
    assert relative_difference(nothing, pair) == float("inf")


@pytest.mark.slow
def test_trained_factors_are_refused_with_what_to_do(world: World, tmp_path: Path) -> None:
    polished = build(world, tmp_path / "polished.gguf", "--operator", "uniform", "--polish", 3,
                     "--seed", 4, "--force")  # fmt: skip
    if "trained" not in account_of(polished):
        pytest.fail("the combination was better than its polished factors")
    scratch = build(world, tmp_path / "scratch.gguf", "--operator", "none", "--polish", 3,
                    "--rank", 4, "--force")  # fmt: skip
    for path, seed in ((polished, 4), (scratch, 0)):
        result = again(world, path)
        assert result.exit_code == 1 and "its factors were trained" in result.stderr
        assert "passes: 3" in result.stderr and "examples: " in result.stderr
        assert f"--polish 3 --seed {seed}" in result.stderr
    assert not (tmp_path / "again.gguf").exists()


def test_every_source_that_is_not_there_is_named(world: World, tmp_path: Path) -> None:
    recorded = tmp_path / "merged.gguf"
    merge_adapters(sources(world), [0.1, 0.2, 0.3, 0.4], recorded)
    bank = tmp_path / "bank"
    shutil.copytree(world.bank, bank)
    adapters = bank / "adapters"
    (adapters / "adapter1.gguf").unlink()
    shutil.copyfile(adapters / "adapter0.gguf", adapters / "adapter2.gguf")
    result = again(world, recorded, bank=bank)
    assert result.exit_code == 1 and "2 of 4 sources are not in" in result.stderr
    hashes = {s["name"]: s["sha256"] for s in account_of(recorded)["sources"]}
    assert f"adapter1: missing (sha256 {hashes['adapter1']})" in result.stderr
    other = f"adapter2: other bytes, sha256 {hashes['adapter0']}, recorded {hashes['adapter2']}"
    assert other in result.stderr and "adapter3" not in result.stderr
    assert not (tmp_path / "again.gguf").exists()


def test_another_base_and_outputs_that_are_inputs(world: World, tmp_path: Path) -> None:
    recorded = tmp_path / "merged.gguf"
    merge_adapters(sources(world)[:2], [0.5, 0.5], recorded)
    tuned = pico.write_base(tmp_path / "tuned.gguf", norm_seed=9)
    line = ("build", "--from", recorded, "--bank", world.bank)
    other = run(*line, "--base", tuned, "-o", tmp_path / "x.gguf")
    assert other.exit_code == 1 and "built for another base" in other.stderr
    for out, what in ((recorded, "is the adapter itself"),
                      (sources(world)[1], "is one of the sources")):  # fmt: skip
        before = out.read_bytes()
        result = run(*line, "--base", world.base, "-o", out, "--force")
        assert result.exit_code == 1 and what in result.stderr
        assert out.read_bytes() == before


def test_a_header_that_differs_is_told(world: World, tmp_path: Path) -> None:
    """Made by another version, and with a source's licence that was recorded otherwise."""
    recorded = tmp_path / "merged.gguf"
    merge_adapters(sources(world)[:2], [0.5, 0.5], recorded, dtype="f32")
    lora = open_lora(recorded)
    account = account_of(recorded) | {"tool": "edgelora 0.0.9"}
    facts = {k: v for k, v in lora.metadata.items() if k.startswith("edgelora.")}
    facts |= {"edgelora.provenance": json.dumps(account), "edgelora.created_by": "edgelora 0.0.9"}
    older = tmp_path / "older.gguf"
    write_lora(older, list(lora.plan.values()), lora.pairs(), architecture="llama", alpha=None,
               dtype="f32", metadata=facts)  # fmt: skip
    result = again(world, older)
    assert result.exit_code == 1
    assert "- edgelora.created_by: edgelora 0.0.9, now edgelora 0." in result.stdout
    assert '- provenance, tool: "edgelora 0.0.9", now "edgelora 0.' in result.stdout
    assert "every tensor that both have is the same, bit by bit" in result.stdout


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"method": "eval"}, "method 'eval'"),
        ({"rank": 0}, "rank 0"),
        ({"rank": True}, "rank True"),
        ({"rank": 10**9}, "rank 1000000000"),
        ({"scale": "1"}, "scale '1'"),
        ({"scale": 10**400}, "scale 1"),
        ({"tensors": []}, "names no tensors"),
        ({"tensors": {"blk.0.nothing": {}}}, "that no source has"),
        ({"cancelled": 3}, "cancelled tensors"),
        ({"base": 3}, "its base is no text"),
        ({"sources": []}, "names no sources"),
        ({"sources": ["x"]}, "source 1: not an object"),
        ({"sources": [{"name": 3, "sha256": "../x", "coefficient": None}]}, "has no sha256"),
        ({"sources": [{"name": "a", "sha256": "0" * 64, "coefficient": 1}] * 2}, "of one name"),
        ({"sources": [{"name": "a", "sha256": "0" * 64, "coefficient": 1, "coefficients": "!"}]},
         "coefficients that cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_account_is_refused(
    change: dict[str, Any], what: str, world: World, tmp_path: Path
) -> None:
    good = tmp_path / "good.gguf"
    merge_adapters(sources(world)[:2], [0.5, 0.5], good)
    path = rewritten(tmp_path / "bad.gguf", world, account_of(good) | change)
    result = again(world, path)
    assert result.exit_code == 1 and what in result.stderr, result.output
    assert not (tmp_path / "again.gguf").exists()


def test_all_problems_of_an_account_at_once(world: World, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "bad.gguf", world, {"method": "x", "sources": [{}, 3]})
    with pytest.raises(InvalidFile) as caught:
        read_recipe(open_lora(path))
    assert len(caught.value.problems) == 8


def test_adapters_that_were_not_built(world: World) -> None:
    result = again(world, sources(world)[0])
    assert result.exit_code == 1 and "does not say how it was made" in result.stderr


def test_options_that_the_file_decides_on(world: World, tmp_path: Path) -> None:
    recorded = tmp_path / "merged.gguf"
    merge_adapters(sources(world)[:2], [0.5, 0.5], recorded)
    result = again(world, recorded, "--data", world.helped, "--rank", 4)
    assert result.exit_code == 2 and "decides by itself on --data, --rank" in result.stderr
    neither = run("build", "--base", world.base, "--bank", world.bank, "-o", tmp_path / "x.gguf")
    assert neither.exit_code == 2 and "One of --data and --describe" in neither.stderr
