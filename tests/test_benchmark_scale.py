"""The benchmark of large banks runs on small ones, and the page is what its results say."""

from __future__ import annotations

from pathlib import Path

import benchmark_scale
import make_shape
import numpy as np
import pytest
from adapter_benchmark.scale import read_rows, report

SMALL = make_shape.Shape(2, 64, 96, 4, 2, 400, 128)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(make_shape.SHAPES, "small", SMALL)
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))


def test_a_real_bank_is_measured_stage_by_stage(tmp_path: Path) -> None:
    base = make_shape.write_base(tmp_path / "small-header.gguf", SMALL, dtype="f16", sparse=True)
    make_shape.write_bank(tmp_path / "bank", SMALL, base, 3, rank=4)
    rows = list(benchmark_scale.measure_bank(tmp_path, "small", [2, 3], 4))
    assert [row["stage"] for row in rows] == [
        "ls", "signatures read", "distances, the bank's part", "distances",
        "mixture, the bank's part", "mixture, the bank's part from the cache", "mixture",
        "merge", "merge",
    ]  # fmt: skip
    assert all(row["k"] == 3 and row["seconds"] > 0 for row in rows)
    assert [row["n"] for row in rows[-2:]] == [2, 3] and rows[-1]["error"] > 0
    assert "| 3 | merge |" in report(rows)


def test_simulated_banks_are_listed_and_compared(tmp_path: Path) -> None:
    rows = list(benchmark_scale.simulate(tmp_path, "small", [5, 20]))
    assert [(row["k"], row["stage"]) for row in rows] == [
        (k, stage) for k in (5, 20) for stage in ("ls", "distances", "coefficients")
    ]
    assert rows[1]["file_bytes"] == 5 * 64 * 2 and not list(tmp_path.iterdir())
    benchmark_scale.draw(rows, tmp_path / "a.svg")
    benchmark_scale.draw(rows, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_squared_distances_by_their_definition() -> None:
    means = np.random.default_rng(0).standard_normal((2500, 8)).astype(np.float16)
    target = np.ones(8, np.float32)
    wanted = ((means.astype(float) - 1) ** 2).sum(axis=1)
    np.testing.assert_allclose(benchmark_scale._squared_distances(means, target), wanted, rtol=1e-5)


def test_the_newest_row_counts_and_half_a_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "scale.jsonl"
    key = '"part": "bank", "shape": "s", "stage": "ls", "k": 1'
    path.write_text(f'{{{key}, "seconds": 1}}\n{{{key}, "seconds": 2}}\n{{"part": "ba')
    assert [row["seconds"] for row in read_rows(path)] == [2]
