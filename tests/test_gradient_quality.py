"""The benchmark of gradients' quality: a run on a pico bed, going on, and the tables."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import builds
import pico
import pytest
from result_lines import append_line

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "benchmark_gradient_quality.py"
ARMS = ["base", "own", "mean", "forward", "forward-2", "gradient-1", "gradient-cv", "few-1",
        "polish-1", "gradient-1 start=forward n_sources=2 ranked_at=mean"]  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(SCRIPT.parent))
    names = ("arms", "bed", "measuring", "report")
    yield {name: importlib.import_module(f"gradient_quality.{name}") for name in names}
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT adapters with a dataset each; task1 and task2 are of one source."""
    folder = tmp_path_factory.mktemp("bed")
    pico.write_base(folder / "base.gguf")
    for i, source in enumerate(("x", "y", "y", "z")):
        task = folder / "data" / f"task{i}"
        task.mkdir(parents=True)
        pico.write_peft(task / "adapter", seed=i, size=0.3)
        for name, n in (("train", 8), ("test", 6)):
            prompts = [f"is the cat on the hill {name} {j}?" for j in range(n)]
            builds.write_lines(task / f"{name}.jsonl", prompts, ["yes", "no"] * (n // 2))
        card = {"task": f"task{i}", "source": [source], "licence": "MIT"}
        (task / "task.json").write_text(json.dumps(card))
    return folder


def run(bed: Path, results: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(results), "--base", str(bed / "base.gguf")]
    command += ["--name", "pico", "--peft", "--data", str(bed / "data"), "--labels", "4"]
    environment = {**os.environ, "EDGELORA_CACHE": str(bed / "cache")}
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.slow
def test_a_run_measures_every_arm_and_goes_on(bed: Path, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    words = ["--tasks", "task1", "--n-test", "5", "--exact"]
    first = run(bed, results, *words, "--arms", *ARMS[:5])
    assert first.returncode == 0, first.stderr
    before = results.read_text()
    done = run(bed, results, *words, "--arms", *ARMS)
    assert done.returncode == 0, done.stderr
    assert results.read_text().startswith(before)
    rows = {row["arm"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert list(rows) == ARMS and len(results.read_text().splitlines()) == len(ARMS)
    assert rows["base"]["labels"] == 0 and rows["mean"]["labels"] == 4
    assert {len(row["nll"]) for row in rows.values()} == {5}
    assert all(0 <= row["exact"] <= 1 for row in rows.values())
    assert rows["gradient-1"]["passes"] == 1 and rows["few-1"]["rank"] == 16
    assert len(rows["gradient-cv"]["held_out_losses"]) > 1
    assert "cat on the hill" not in results.read_text()
    assert "### pico, 4 labels: 1 tasks, 1 seed(s)" in done.stdout
    again = run(bed, results, *words, "--arms", *ARMS)
    assert again.stdout == done.stdout
    assert run(bed, results, "--report").stdout == done.stdout


def test_the_task_s_source_is_hidden(bed: Path, tmp_path: Path, parts: Any) -> None:
    bank = parts["bed"].make_bank(tmp_path / "bank", bed / "base.gguf", bed / "data")
    with parts["bed"].open_bed(
        "pico", bed / "base.gguf", bank, bed / "data", n_threads=1
    ) as opened:
        make = parts["bed"].make_case
        case = make(opened, "task1", n_labels=4, n_test=3, seed=0)
        assert case.pool.names == ["task0", "task3"]
        assert case.own.stem == "task1" and len(case.texts) == 4 and len(case.test_texts) == 3
        fewer = make(opened, "task1", n_labels=2, n_test=3, seed=0)
        assert fewer.support == case.support[:2] and fewer.test == case.test
        other = make(opened, "task1", n_labels=4, n_test=3, seed=1)
        assert other.support != case.support


def test_an_unknown_arm_is_refused(bed: Path, tmp_path: Path) -> None:
    done = run(bed, tmp_path / "r.jsonl", "--arms", "guess")
    assert done.returncode == 2 and "no arm 'guess'" in done.stderr


def test_settings_of_an_arm(parts: Any) -> None:
    parse = parts["arms"].parse_arm
    arm = parse("gradient-3 step=0.1 batch_size=0 weights=layer rank=cat scale=0")
    assert arm.keywords == {
        "n_passes": 3, "n_folds": 0, "step": 0.1, "batch_size": 0, "weights": "layer",
        "rank": "cat", "scale": 0,
    }  # fmt: skip
    assert parse("gradient-cv n_folds=4").keywords == {"n_folds": 4}
    assert parse("polish-3").keywords == {"n_first": 3, "n_passes": 7}
    assert parse("forward-3 operator=cma budget=9").keywords == {
        "n": 3, "operator": "cma", "budget": 9,
    }  # fmt: skip
    for wrong in ("gradient", "gradient-x", "forward-x", "forward-2 rank=3", "forward operator=cma",
                  "forward-2 operator=none", "few-cv", "base rank=3", "few-3 weights=layer",
                  "gradient-3 start=own", "gradient-3 ranked_at=own"):  # fmt: skip
        with pytest.raises(ValueError, match="no (arm|setting)"):
            parse(wrong)


def line(task: str, arm: str, loss: float, **more: Any) -> dict[str, Any]:
    labels = 0 if arm in ("base", "own") else 16
    row = {"bed": "b", "task": task, "source": [task[0]], "seed": 0, "labels": labels, "arm": arm}
    return row | {"loss": loss, "exact": 0.5, "nll": [loss, loss], "n_tokens": [1, 1]} | more


def test_shares_are_ratios_of_means(parts: Any) -> None:
    """Two tasks with gaps of 4 and 1 nats, of which 3 and 0 are recovered: 3 of 5."""
    lines = [
        line("a", "base", 5.0), line("a", "own", 1.0), line("a", "gradient-1", 2.0, exact=1.0),
        line("b", "base", 2.0), line("b", "own", 1.0), line("b", "gradient-1", 2.0),
        line("a", "forward", 4.0), line("b", "forward", 3.0),
    ]  # fmt: skip
    rows = {parts["measuring"].key_of(row): row for row in lines}
    told = parts["report"].report(rows)
    (gradient,) = [row for row in told.splitlines() if row.startswith("| gradient-1")]
    (forward,) = [row for row in told.splitlines() if row.startswith("| forward")]
    difference = "0.600 [0.500, 1.000], exact +0.25 [+0.00, +0.50]"
    assert f"| 2 | 0.600 [0.000, 0.750] | {difference} |" in gradient
    assert "| 0.750 (1.50 of own) |" in gradient and gradient.endswith("| 0 |")
    assert "| 2 | 0.000 [-1.000, 0.250] |" in forward and forward.endswith("| 1 |")


def test_an_early_stop_beside_the_best_pass(parts: Any) -> None:
    """A gap of 4 nats, least loss 2 after 1 pass of 3, stopped at 2.5: 0.125 of the gap above."""
    lines = [
        line("a", "base", 5.0), line("a", "own", 1.0), line("a", "gradient-1", 2.0),
        line("a", "gradient-3", 3.0), line("a", "gradient-cv", 2.5, passes=2),
    ]  # fmt: skip
    rows = {parts["measuring"].key_of(row): row for row in lines}
    told = parts["report"].report(rows)
    assert "*gradient-cv* stopped after 2.0 passes on average (2 to 2)" in told
    assert "after 1, 3 passes by 0.125 of the gap (at most 0.50 nats, below it in 0 of 1" in told


def test_a_half_written_line_is_measured_again(parts: Any, tmp_path: Path) -> None:
    path, measuring = tmp_path / "r.jsonl", parts["measuring"]
    path.write_text(json.dumps(line("a", "base", 5.0)) + '\n{"bed": "b", "task')
    assert len(measuring.read_results(path)) == 1
    append_line(path, line("a", "own", 1.0))
    assert len(measuring.read_results(path)) == 2
