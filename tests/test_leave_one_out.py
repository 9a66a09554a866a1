"""A bank judged on itself: what is hidden, shares by hand, and the command on a pico bank."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import beds
import numpy as np
import pytest
from cli_runner import run

from edgelora.bank import open_bank
from edgelora.errors import DatasetError, NotFound
from edgelora.leave_one_out.cases import draw, find_tasks
from edgelora.leave_one_out.lines import append_line, read_lines
from edgelora.leave_one_out.shares import ahead, recovered
from edgelora.leave_one_out.splits import Origin, deal, families, hidden, origin_of
from edgelora.leave_one_out.summary import summarise_arms


def origin(sources: str, categories: str = "") -> Origin:
    return Origin(frozenset(sources), frozenset(categories))


ORIGINS = {
    "a1": origin("a", "p"),
    "ab": origin("ab", "q"),
    "b1": origin("b", "p"),
    "c1": origin("c", "q"),
    "unknown": origin(""),
}


def test_what_each_split_hides() -> None:
    assert hidden("a1", ORIGINS, "task") == ["a1"]
    assert hidden("a1", ORIGINS, "source") == ["a1", "ab"]
    assert hidden("a1", ORIGINS, "category") == ["a1", "ab", "b1"]
    assert hidden("ab", ORIGINS, "source") == ["a1", "ab", "b1"]
    # Nothing recorded: nothing is known to be kin.
    assert all(hidden("unknown", ORIGINS, s) == ["unknown"] for s in ("task", "source", "category"))
    with pytest.raises(ValueError, match="no split"):
        hidden("a1", ORIGINS, "sauce")


def test_families_are_the_connected_components() -> None:
    found = families({task: origin.sources for task, origin in ORIGINS.items()})
    assert found == {"a1": 0, "ab": 0, "b1": 0, "c1": 1, "unknown": 2}


def test_families_of_random_sources_against_scipy() -> None:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(0)
    for n_sources in (3, 10, 40):
        owned = rng.random((30, n_sources)) < 0.06
        found = families({str(i): map(str, np.flatnonzero(row)) for i, row in enumerate(owned)})
        _, expected = connected_components(coo_matrix(owned.astype(int) @ owned.T), directed=False)
        for i, j in itertools.combinations(range(30), 2):
            assert (found[str(i)] == found[str(j)]) == (expected[i] == expected[j])


def test_folds_part_no_family_and_are_even() -> None:
    family = {str(i): i // 3 for i in range(30)}
    fold = deal(family, 5)
    assert {len({fold[t] for t in family if family[t] == f}) for f in range(10)} == {1}
    assert [list(fold.values()).count(i) for i in range(5)] == [6] * 5
    assert deal(family, 5) == fold != deal(family, 5, seed=1)


def test_shares_by_hand() -> None:
    """Gaps of 4, 1 and 0.1 nats, the last too small; 3 and -0.1 are recovered: 2.9 of 5."""
    found = recovered([5.0, 2.0, 1.0], [2.0, 2.1, 0.5], [1.0, 1.0, 0.9], ["a", "b", "b"])
    assert (found.n_tasks, found.ratio) == (2, pytest.approx(0.58))
    assert found.median == pytest.approx((0.75 - 0.1) / 2)
    assert found.below == pytest.approx(1 / 3) and found.worst == pytest.approx(0.1)
    assert found.low == pytest.approx(-0.1) and found.high == pytest.approx(0.75)


def test_one_arm_ahead_of_another_by_hand() -> None:
    low, mid, high = ahead([2.0, 2.0], [3.0, 1.9], [5.0, 2.0], [1.0, 1.0], ["a", "b"])
    assert mid == pytest.approx(0.9 / 5) and low == pytest.approx(-0.1)
    assert high == pytest.approx(0.25)


def test_nothing_to_recover_has_no_share() -> None:
    found = recovered([1.0, 1.0], [0.9, 1.1], [0.9, 1.1], ["a", "b"])
    assert found.n_tasks == 0 and math.isnan(found.ratio) and math.isnan(found.median)
    assert found.below == 0.5
    with pytest.raises(ValueError, match="shapes"):
        recovered([], [], [], [])
    with pytest.raises(ValueError, match="shapes"):
        recovered([1.0], [1.0, 2.0], [1.0], ["a"])


def test_lines_survive_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    assert list(read_lines(path)) == []
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('[1]\n{"b": ')
    append_line(path, {"c": 2})
    assert list(read_lines(path)) == [{"a": 1}, {"c": 2}]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pico bank of four adapters with sources, and their datasets."""
    folder = beds.write_bed(tmp_path_factory.mktemp("bed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_CACHE", str(folder / "cache"))
        patch.setenv("COLUMNS", "160")
        data = folder / "data"
        done = run("bank", "add", *sorted(data.glob("*/adapter")), "--bank", folder / "bank",
                   "--base", folder / "base.gguf", "--data-glob", "{parent}/train.jsonl",
                   "--card-glob", "{parent}/task.json", "--threads", 1)  # fmt: skip
        assert done.exit_code == 0, done.stderr
        yield folder


def evaluate(bed: Path, results: Path, *words: object) -> list[dict[str, object]]:
    done = run("bank", "evaluate", "--base", bed / "base.gguf", "--bank", bed / "bank",
               "--data", bed / "data", "-o", results, "--threads", 1, "--test", 6, *words,
               "--json")  # fmt: skip
    assert done.exit_code == 0 and "peak memory: " in done.stderr, done.stderr
    return json.loads(done.stdout)["rows"]


def test_lines_are_drawn_by_the_seed(bed: Path) -> None:
    few = draw(bed / "data", "task0", "train", 4, seed=0)
    assert few == draw(bed / "data", "task0", "train", 8, seed=0)[:4]
    assert few != draw(bed / "data", "task0", "train", 4, seed=1)
    with pytest.raises(DatasetError, match="24 lines, 99 with completions are needed"):
        draw(bed / "data", "task0", "train", 99, seed=0)
    with pytest.raises(NotFound, match=r"0 files exam\.\*"):
        draw(bed / "data", "task0", "exam", 1, seed=0)
    with pytest.raises(NotFound, match="no folder is named like"):
        find_tasks(bed, ["task0"])


def test_an_evaluation_measures_and_goes_on(bed: Path, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    rows = evaluate(bed, results, "--task", "task1")
    assert [(r["task"], r["arm"]) for r in rows] == [
        ("task1", arm) for arm in ("base", "mean", "default", "own")
    ]
    assert list(read_lines(results)) == rows
    assert all(0 <= r["exact"] <= 1 and r["source"] == ["y"] for r in rows)
    assert "hill" not in results.read_text()
    kept = results.read_text().splitlines(keepends=True)
    results.write_text("".join(kept[:3]) + kept[3][:20])
    again = evaluate(bed, results, "--task", "task1")
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]
    assert results.read_text().startswith("".join(kept[:3]))


def test_the_default_is_built_without_its_kin(bed: Path, tmp_path: Path) -> None:
    """By hand: the mean of a category's outsiders is the one other adapter, at its best scale."""
    by_source = evaluate(bed, tmp_path / "r.jsonl", "--task", "task1", "--no-generate")
    (mean,) = [r for r in by_source if r["arm"] == "mean"]
    assert mean["exact"] is None and mean["chosen"].startswith("uniform mean")
    by_category = evaluate(
        bed, tmp_path / "r.jsonl", "--task", "task1", "--no-generate", "--split", "category"
    )
    (other,) = [r for r in by_category if r["arm"] == "mean"]
    assert other["loss"] != mean["loss"]
    assert len(list(read_lines(tmp_path / "r.jsonl"))) == 8


def test_the_table_is_the_summary_of_the_lines(bed: Path, tmp_path: Path) -> None:
    done = run("bank", "evaluate", "--base", bed / "base.gguf", "--bank", bed / "bank", "--data",
               bed / "data", "-o", tmp_path / "r.jsonl", "--threads", 1, "--test", 4, "--task",
               "task0", "--no-generate")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = {arm.arm: arm for arm in summarise_arms(list(read_lines(tmp_path / "r.jsonl")))}
    assert found["base"].recovered.worst == 0.0 and found["own"].n_tasks == 1
    for arm in found.values():
        assert f"{arm.loss:.4f}" in done.stdout


def test_sources_are_those_of_the_card(bed: Path) -> None:
    origins = {r.name: origin_of(r) for r in open_bank(bed / "bank").records()}
    assert origins["task2"] == Origin(frozenset("y"), frozenset("b"))


def test_a_folder_without_datasets_is_refused(bed: Path, tmp_path: Path) -> None:
    done = run("bank", "evaluate", "--base", bed / "base.gguf", "--bank", bed / "bank", "--data",
               tmp_path, "-o", tmp_path / "r.jsonl")  # fmt: skip
    assert done.exit_code == 1 and "no folder is named like an adapter" in done.stderr
