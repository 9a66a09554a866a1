"""The benchmark of suggestions: its ways to compare against references, its ranks, its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench_report
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from suggest_benchmark import arms, measuring, queries, report

from edgelora.suggest.catalogue import FIELDS, Catalogue, Counts, Entry
from edgelora.suggest.similarity import WEIGHTS, field_similarity

ROOT = Path(__file__).parent.parent
N_ROWS = 5


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    """Five rows over forty tokens, from two sources and two categories."""
    rng = np.random.default_rng(0)
    counts = {}
    for field in FIELDS:
        dense = rng.integers(0, 4, (N_ROWS, 40))
        dense[:, 0] = 1
        rows, tokens = np.nonzero(dense)
        indptr = np.searchsorted(rows, np.arange(N_ROWS + 1)).astype(np.int64)
        counts[field] = Counts(indptr, tokens, dense[rows, tokens].astype(float))
    entries = tuple(
        Entry(f"task{i}", "o/a", "o/d", (f"s{i // 3}",), (f"c{i % 2}",), (), 3)
        for i in range(N_ROWS)
    )
    return Catalogue(entries, (), counts)


def test_the_default_is_an_arm_and_equals_the_library(catalogue: Catalogue) -> None:
    found = list(queries.row_queries(catalogue))
    pairs = arms.matrices(found, catalogue)
    (arm,) = [arm for arm in arms.ARMS if arm.name == arms.DEFAULT]
    for field in FIELDS:
        scores = arm.compare(*pairs[field])
        expected = [field_similarity(q.counts[field], catalogue.counts[field]) for q in found]
        assert scores == pytest.approx(np.array(expected))


@pytest.mark.parametrize("arm", arms.ARMS[1:], ids=lambda arm: arm.name)
def test_every_arm_but_chance_finds_the_row_itself(arm: arms.Arm, catalogue: Catalogue) -> None:
    found = list(queries.row_queries(catalogue))
    pairs = arms.matrices(found, catalogue)
    scores = arm.compare(*pairs["prompt"])
    assert scores.shape == (N_ROWS, N_ROWS) and np.isfinite(scores).all()
    # The paper's MMD draws 1,000 ids of each side, so it may take another row for the same.
    if "mmd" not in arm.name:
        assert (scores.argmax(axis=1) == np.arange(N_ROWS)).all()


def test_arms_equal_references(catalogue: Catalogue) -> None:
    found = list(queries.row_queries(catalogue))
    own, rows = arms.matrices(found, catalogue)["completion"]
    p, c = (m.toarray() for m in (own, rows))
    q, d = p[1], c[3]
    idf = np.log(6 / (1 + (c > 0).sum(axis=0)))
    a, b = (np.where(x > 0, 1 + np.log(np.maximum(x, 1)), 0) * idf for x in (q, d))
    assert arms.tf_idf(own, rows)[1, 3] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
    share, length = q / q.sum(), d.sum()
    background = (c / c.sum(axis=1, keepdims=True)).mean(axis=0)
    smoothed = (d + arms.MU * background) / (length + arms.MU)
    used = q > 0
    expected = (share[used] * np.log(smoothed[used] / background[used])).sum()
    assert arms.query_likelihood(own, rows)[1, 3] == pytest.approx(expected)
    part = d * 2.2 / (d + 1.2 * (0.25 + 0.75 * length / c.sum(axis=1).mean()))
    assert arms.bm25(own, rows)[1, 3] == pytest.approx((share * part * idf).sum())
    js = arms.paper(own, rows, name="js_fixed")[1, 3]
    assert js == pytest.approx(-(jensenshannon(q, d) ** 2), abs=1e-6)


def test_one_text_counts_the_instruction_in_every_instance(catalogue: Catalogue) -> None:
    found = list(queries.row_queries(catalogue))
    pairs = arms.matrices(found, catalogue)
    dense = {name: rows.toarray() for name, (_, rows) in pairs.items()}
    pooled = 3 * dense["instruction"] + dense["prompt"] + dense["completion"]
    assert (dense["pooled"] == pooled).all() and (pairs["pooled"][0].toarray() == pooled).all()


def test_ranks_by_hand() -> None:
    scores = np.array([[0.9, 0.5, 0.7, 0.7], [0.1, 0.2, 0.3, 0.4]])
    right = np.array([[False, True, False, True], [False] * 4])
    hidden = np.array([[True, False, False, False], [False] * 4])
    # Of 0.7 and 0.7 the wrong one comes first; the hidden 0.9 does not count.
    places = measuring.ranks(scores, right, hidden)
    assert places[0] == 2 and np.isnan(places[1])
    assert measuring.ranks(scores, right, np.zeros_like(hidden))[0] == 3


def test_what_is_right_and_what_is_hidden(catalogue: Catalogue) -> None:
    query = queries.Query("16 lines", "task0", ("s0",), ("c0",), 3, {})
    targets = measuring.judged([query], catalogue.counted)
    as_text = {
        name: "".join(np.where(right[0], "r", np.where(hidden[0], "h", "-")))
        for name, (right, hidden) in targets.items()
    }
    assert as_text == {
        "own row": "r----",
        "source": "hrr--",
        "category": "h-r-r",
        "category, source hidden": "hhh-r",
    }


def test_weights_are_tuned_to_what_finds_more(catalogue: Catalogue) -> None:
    """Only the prompts tell the right row: all the weight that matters goes to them."""
    found = [queries.Query("16 lines", "x", ("s1",), ("none",), 3, {}) for _ in range(4)]
    targets = {"source": measuring.judged(found, catalogue.counted)["source"]}
    good = np.tile([0.0, 0.1, 0.2, 0.3, 5.0], (4, 1))
    by_field = {"instruction": -good, "prompt": good, "completion": -good}
    weights, quality = measuring.tuned(by_field, found, targets)
    assert quality == 1.0 and weights["prompt"] > 0.5
    assert len(measuring.grid()) == 45
    assert all(sum(weights.values()) == 1 for weights in measuring.grid())


def test_no_source_is_on_both_sides() -> None:
    tasks = [queries.Query("k", f"t{i}", (f"s{i % 30}",), (), 1, {}) for i in range(90)]
    sides = {(query.source, query.for_tuning) for query in tasks}
    assert len(sides) == 30 and 5 < sum(side for _, side in sides) < 25


def test_the_page_is_what_the_results_say() -> None:
    for page, text in bench_report.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run make bench-report"


def test_the_default_is_the_best_arm_with_the_weights_of_the_tuning_half() -> None:
    rows = bench_report.read_results(bench_report.SUGGESTIONS)
    assert {row["model"] for row in rows} == {arm.name for arm in arms.ARMS}
    best = max(rows, key=lambda row: row["mrr"])
    assert best["model"] == arms.DEFAULT and best["weights"] == dict(WEIGHTS)


@pytest.mark.slow
def test_a_run_appends_what_is_missing_and_goes_on(tmp_path: Path) -> None:
    """The script on a lab of three tasks and the shipped catalogue, all arms but one known."""
    for name, source in (("task1", "mathqa"), ("task2", "snli"), ("task3", "winogrande")):
        (tmp_path / name).mkdir()
        facts = {"source": [source], "category": ["Question Answering"]}
        (tmp_path / name / "task.json").write_text(json.dumps(facts))
        lines = [{"prompt": f"Answer {name}.\n\nno {i}", "completion": "a"} for i in range(64)]
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    results = tmp_path / "results.jsonl"
    known = [arm.name for arm in arms.ARMS if arm.name != "TF-IDF, one text"]
    results.write_text("".join(f'{{"part": "suggest", "model": "{name}"}}\n' for name in known))
    script = ROOT / "scripts" / "benchmark_suggest.py"
    command = [sys.executable, str(script), str(ROOT / "models" / "catalogue"), str(tmp_path)]
    done = subprocess.run([*command, str(results), "--seeds", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(results.read_text().splitlines()[-1])
    assert row["model"] == "TF-IDF, one text" and row["weights"] is None and row["seeds"] == 1
    assert {cell["kind"] for cell in row["cells"]} <= set(queries.KINDS)
    assert all(0 <= cell["top1"] <= cell["top5"] <= cell["top32"] <= 1 for cell in row["cells"])
    assert report.report([row]).count("| TF-IDF, one text |") >= 2
