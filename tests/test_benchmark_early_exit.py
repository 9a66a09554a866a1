"""The benchmark of early exit: ranks by hand, a real run on a pico base, its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bench_report
import builds
import numpy as np
import pico
import pytest
from early_exit import quality, report, speed

from edgelora.engine.model import ModelOptions, open_model

ABOUT = {"when": "2026-01-01 00:00 UTC", "commit": "abc", "cpu": "a CPU",
         "llama_cpp_python": "0.3.36", "model": "m"}  # fmt: skip
DIMS = replace(pico.Dims(), n_layer=4)


def task(name: str, source: str, category: str) -> quality.Task:
    return quality.Task(name, frozenset([source]), frozenset([category]), (), ((),))


def test_what_a_shortlist_finds_by_hand() -> None:
    """Four tasks; a and b share a source, a and c a category, d stands alone."""
    tasks = [task("a", "s", "x"), task("b", "s", "y"), task("c", "t", "x"), task("d", "u", "z")]
    whole = np.array([[4, 3, 2, 1], [1, 4, 3, 2], [4, 1, 3, 2], [1, 2, 3, 4]], float)
    scores = {"bures": [(row, row) for row in whole]}
    cells = quality._judge(tasks, scores)["bures"]["cells"]
    # Own: first for a, b and d; for c, a is nearer.
    assert cells[quality.OWN] == {"n": 4, "mrr": 3.5 / 4, "top1": 0.75, "top5": 1.0}
    # Source: a finds b first, b finds a third. Category: a finds c second, c finds a first.
    assert cells[quality.SOURCE] == {"n": 2, "mrr": pytest.approx(2 / 3), "top1": 0.5, "top5": 1.0}
    assert cells[quality.CATEGORY]["mrr"] == 0.75
    # With b hidden too, c is the first for a.
    assert cells[quality.FOREIGN]["mrr"] == 1.0
    judged = quality._judge(tasks, scores)["bures"]["quality"]
    assert judged == pytest.approx((2 / 3 + 0.75 + 1.0) / 3)


def test_agreement_by_hand() -> None:
    whole = [np.arange(10.0), np.arange(10.0)]
    early = [np.arange(10.0), np.array([9, 8, 7, 6, 5, 0, 1, 2, 3, 4.0])]
    assert quality._agreement(whole, early) == (1.0 + 0.0) / 2


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
    for i, words in enumerate(("the that this", "he his him", "on at in")):
        folder = tmp_path / "tasks" / f"task{i}"
        folder.mkdir(parents=True)
        for name, n in (("train", 6), ("test", 4)):
            lines = [f"{words} {name} {j}" for j in range(n)]
            builds.write_lines(folder / f"{name}.jsonl", lines, [f"yes {j}" for j in range(n)])
        facts = {"source": [f"s{i // 2}"], "category": ["c"]}
        (folder / "task.json").write_text(json.dumps(facts))
    return tmp_path / "tasks"


def test_quality_is_measured_and_shown(tasks: Path, tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf", dims=DIMS)
    with open_model(base, ModelOptions(n_threads=1)) as model:
        found = quality.measure_quality(model, quality.read_tasks(tasks, 6, 2, 2), [1, 0])
    assert (found["n_asked"], found["n_known"], found["lines"]) == (6, 6, 2)
    assert [depth["n_layers"] for depth in found["depths"]] == [1, 4]
    assert found["depths"][1]["bures"]["agreement"] == 1.0
    assert found["depths"][0]["bures"]["cells"]["own"]["n"] == 6
    table = report.quality_table({**ABOUT, "type": None, **found})
    assert (
        "| nearest by Bures | 1 of 4 |" in table and "| weight in the mixture | 4 of 4 |" in table
    )
    assert "own (6)" in table and "source (4)" in table


def test_speed_is_measured_beside_llama_cpp_python(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf", dims=DIMS)
    texts = ["the cat and the hat", "is it you?", "x" * 1000, ""]
    row = speed.measure_speed(base, texts, [1, 0], rounds=2, n_threads=1)
    assert row["n_texts"] == 3, "an empty text is only BOS; the long one would be cut"
    assert row["difference"] < 1e-3, "both compute the same means"
    assert [depth["n_layers"] for depth in row["depths"]] == [1, 4]
    assert row["depths"][1]["of_all"] == 1.0
    table = report.speed_table({**ABOUT, **row})
    assert "| edgelora, 1 of 4 layers |" in table and "at least 3.60 of all" in table
    assert "llama-bench" not in table
    beside = {"bench": 50.0, "of_bench": 0.951, "of_bench_median": 0.94, "theirs": 100.0}
    table = report.speed_table({**ABOUT, **row, **beside})
    assert "| llama-bench pp, one prompt | 50 | 0.50 |" in table
    assert "to llama-bench's pp: 0.95 (at least 0.95: met), median of the rounds 0.94." in table


def test_what_a_system_tells_of_itself_counts() -> None:
    """llama-bench loads and warms up first: its own time stands, not that of the process."""
    seconds = speed._take_turns({"told": lambda: 100.0, "timed": lambda: None}, rounds=2)
    assert seconds["told"] == [100.0, 100.0]
    assert len(seconds["timed"]) == 2 and max(seconds["timed"]) < 100


def test_types_are_shown(tmp_path: Path) -> None:
    row = {
        "cpu": "a CPU", "cores": 2, "base": "b.gguf", "llama_cpp_python": "1", "n_layer": 32,
        "n_measured": 2, "threads": {"prompt": 2, "decode": 1}, "fastest": "q4_0",
        "types": [{"file_type": "q4_0", "size_bytes": 4_100_000_000, "prompt": 20.04, "decode": 4}],
    }  # fmt: skip
    path = tmp_path / "types.jsonl"
    assert bench_report.types_report(path) == bench_report.NOTHING
    path.write_text(json.dumps(row) + "\n")
    table = bench_report.types_report(path)
    assert "**b.gguf**, from 2 of its 32 layers, a CPU" in table
    assert "| q4_0 | 4.10 | 20.0 | 4.0 |" in table
