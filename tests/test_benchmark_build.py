"""The benchmark of whole commands at 7B, on a small shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import benchmark_build
import make_shape
import pytest
from build_benchmark import report

SMALL = make_shape.Shape(2, 64, 96, 4, 2, 400, 512)


@pytest.mark.slow
def test_builds_and_banks_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_shape.write_base(tmp_path / "small-q8_0.gguf", SMALL, dtype="q8_0")
    make_shape.write_bank(tmp_path / "bank", SMALL, base, 3, rank=4)
    make_shape.write_peft(tmp_path / "peft-0", SMALL, rank=4)
    data, results = tmp_path / "data.jsonl", tmp_path / "results.jsonl"
    lines = [json.dumps({"prompt": f"say {i % 7}", "completion": "ab"[i % 2]}) for i in range(40)]
    data.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(benchmark_build, "N_PROMPT", 32)
    monkeypatch.setattr(sys, "argv", [
        "benchmark_build", str(tmp_path), "--shape", "small", "--type", "q8_0", "--data", str(data),
        "--results", str(results), "--parts", "first", "again", "gradient", "convert", "ls",
    ])  # fmt: skip
    benchmark_build.main()
    rows = {row["part"]: row for row in report.read_rows(results)}
    assert list(rows) == ["first", "again", "gradient", "convert", "ls"]
    assert rows["gradient"]["options"][:3] == ["--low-ram", "--refine", "gradient"]
    assert rows["again"]["n_tokens"] == 0 < rows["first"]["n_tokens"]
    assert rows["first"]["prompt_tokens_per_s"] > 0 and rows["ls"]["n_adapters"] == 3
    assert all(row["peak_mb"] > 10 and row["seconds"] > 0 for row in rows.values())
    told = report.report(list(rows.values()))
    assert told.count(": met") >= 3 and "The plan, told after" in told


def test_a_limit_of_memory_has_rows_of_its_own() -> None:
    row = {"part": "serve", "shape": "s", "type": "q4_0", "seconds": 3.0, "peak_mb": 1.0}
    small = {**row, "limit_gb": 5.0, "disk_gb": 4.08, "peak_mb": 2.0}
    first, second = report.report([small, row]).splitlines()[2:]
    assert "answer |" in first and first.endswith("| 1 | 700: met |  |")
    assert "answer, in a cgroup of 5 GB |" in second and second.endswith("| 2 | 700: met | 4.1 |")


def test_what_misses_its_bound_is_told() -> None:
    row = {"part": "serve", "shape": "s", "type": "q4_0", "seconds": 3.0, "peak_mb": 701.0}
    assert "| 3.0 |  | 701 | 700: **missed** |" in report.report([row])
    assert report.report([]) == "Not measured yet."
