"""The benchmark of operators: a run on a pico bed, arms against references, and the tables."""

from __future__ import annotations

import json
import re
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import beds
import bench_report
import benchmark_operators as script
import numpy as np
import pytest
from gradient_quality import bed as beds_module
from gradient_quality import report as gradient_report
from operators_benchmark import (
    controls,
    lorahub,
    measuring,
    paper,
    paper_protocol,
    pictures,
    registry,
    report,
    results,
    summary,
)
from operators_benchmark.bench import Bench
from operators_benchmark.costs import Meter
from result_lines.svg import save_svg
from scipy.spatial.distance import jensenshannon

from edgelora.adapters.gguf_lora import open_lora
from edgelora.engine.context import open_context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import mean_loss, score
from edgelora.errors import EdgeLoRAError, NotFound
from edgelora.operators.heads import neural
from edgelora.operators.neural import NeuralHead, save_heads

ROOT = Path(__file__).parent.parent
FEW = ["uniform", "uniform combine=svd rank=4", "mean", "paper-js-normalized", "op-gibbs", "few-1"]
ARMS = ["uniform", "uniform combine=svd rank=4", "mean", "nearest", "random n=2", "shuffled",
        "oracle-single", "ceiling n=6 n_passes=1", "in-context", "paper-js-normalized",
        "paper-mmd-attentional combine=exact", "op-mixture", "op-gibbs", "op-surrogate",
        "gradient-1", "few-1", "build"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        made = beds.write_bed(tmp_path_factory.mktemp("bed"))
        patch.setenv("EDGELORA_CACHE", str(made / "cache"))
        yield made


@pytest.fixture(scope="module")
def bed(folder: Path) -> Iterator[beds_module.Bed]:
    base, data = folder / "base.gguf", folder / "data"
    bank = beds_module.make_bank(script.work_folder("pico") / "bank", base, data)
    with beds_module.open_bed("pico", base, bank, data, n_threads=1) as opened:
        yield opened


@pytest.fixture
def bench(bed: beds_module.Bed, tmp_path: Path) -> Iterator[Bench]:
    case = beds_module.make_case(bed, "task0", n_labels=6, n_test=4, seed=0)
    with open_context(bed.model, n_ctx=512) as context:
        opened = Bench(case, 6, context, tmp_path, tmp_path / "heads", n_prompt=120)
        with opened.meter.billing():
            yield opened
        context.apply([])


def run(folder: Path, results: Path, *words: str) -> list[dict[str, Any]]:
    line = ["benchmark_operators.py", "run", "--name", "pico", "--base", folder / "base.gguf",
            "--peft", "--data", folder / "data", "--results", results, "--n-test", "5"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, line), *words])
        assert script.main() == 0
    return [json.loads(row) for row in results.read_text().splitlines()]


@pytest.mark.parametrize("arms", [FEW, pytest.param(ARMS, marks=pytest.mark.slow)], ids=len)
def test_a_run_measures_every_arm_and_goes_on(
    folder: Path, tmp_path: Path, arms: list[str]
) -> None:
    path = tmp_path / "r.jsonl"
    words = ["--tasks", "task1", "--labels", "6", "--answers", "--paper", "--arms"]
    run(folder, path, *words, *arms[:3])
    before = path.read_text()
    rows = run(folder, path, *words, *arms)
    assert path.read_text().startswith(before)
    by_arm = {row["arm"]: row for row in rows}
    assert [row["arm"] for row in rows] == ["base", "own", *arms]
    assert all(np.isfinite(row["loss"]) and 0 <= row["exact"] <= 1 for row in rows)
    assert all(row["source"] == ["y"] and row["category"] == ["a"] for row in rows)
    assert "hill" not in path.read_text()
    assert by_arm["base"]["split"] is None and by_arm["base"]["labels"] is None
    assert by_arm["uniform"]["split"] == "source" and by_arm["uniform"]["labels"] is None
    assert by_arm["few-1"]["split"] is None and by_arm["few-1"]["labels"] == 6
    assert by_arm["uniform combine=svd rank=4"]["rank"] == 4
    # Two adapters are no kin; two of them are charged for whoever measures each alone.
    assert by_arm["op-gibbs"]["tokens"] > by_arm["mean"]["tokens"] > 0
    assert by_arm["paper-js-normalized"]["tokens"] == by_arm["uniform"]["tokens"] == 0
    assert set(by_arm["paper-js-normalized"]["coefficients"]) == {"task0", "task3"}
    assert by_arm["own"]["paper"]["mse_factors"] == 0 == by_arm["own"]["paper"]["mse_updates"]
    assert run(folder, path, *words, *arms) == rows
    assert not list(script.work_folder("pico").glob("task*"))


def test_without_labels_prompts_alone_are_seen(folder: Path, tmp_path: Path) -> None:
    words = ["--tasks", "task0", "--labels", "0", "--arms", "mean", "op-mixture", "op-gibbs",
             "paper-js-normalized", "build", "in-context"]  # fmt: skip
    rows = {row["arm"]: row for row in run(folder, tmp_path / "r.jsonl", *words)}
    assert list(rows) == ["base", "own", "mean", "op-mixture", "paper-js-normalized", "build"]
    assert rows["mean"]["labels"] == 0 and rows["mean"]["scale"] == 1.0
    assert rows["build"]["chosen"] == "normalized" and rows["mean"]["tokens"] == 0


def test_a_wrong_arm_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    for wrong in ("guess", "paper-js", "mean scale=2", "op-auto", "gradient-3 start=own"):
        with pytest.raises(SystemExit):
            run(folder, tmp_path / "r.jsonl", "--arms", wrong)
    assert not (tmp_path / "r.jsonl").exists()


def test_every_group_is_known() -> None:
    arms = registry.expand(registry.GROUPS)
    assert [arm.name for arm in arms[:2]] == ["base", "own"]
    assert len([arm for arm in arms if arm.name.startswith("paper-")]) == 24
    assert len({arm.name for arm in arms}) == len(arms)


# Costs.


def test_what_is_shared_is_charged_to_each() -> None:
    meter, made = Meter(), []

    def inner() -> str:
        meter.spend(10)
        time.sleep(0.02)
        return "inner"

    def outer() -> str:
        meter.spend(5)
        made.append(meter.shared("inner", inner))
        return "outer"

    with meter.billing() as first:
        meter.spend(1)
        assert meter.shared("outer", outer) == meter.shared("outer", outer) == "outer"
    with meter.billing() as second:
        meter.shared("outer", outer)
        meter.shared("inner", inner)
    assert made == ["inner"]
    assert (first.tokens, first.total().tokens, second.total().tokens) == (1, 16, 15)
    assert set(second.parts) == {"inner", "outer"}
    assert first.total().wall_s >= 0.02 > first.wall_s
    assert second.total().wall_s >= 0.02 > second.wall_s


# The paper's cells.


def test_a_cell_is_the_paper_s_formula(bench: Bench) -> None:
    """Normalized JS: z-scores with the diagonal's 0 among them, softmin, factors averaged apart."""
    others = [_densities(bench, signature) for signature in bench.pool.others]
    own = _densities(bench, bench.counts())
    distances = np.array([jensenshannon(own, other) ** 2 for other in others])
    z = (distances - np.append(distances, 0).mean()) / np.append(distances, 0).std()
    expected = np.exp(-z) / np.exp(-z).sum()
    made = paper.make_cell(bench, distance="js", head="normalized")
    assert made.coefficients is not None
    np.testing.assert_allclose(made.coefficients, expected, rtol=1e-4)
    file = open_lora(made.adapters[0].path)
    name = file.names[0]
    for key in ("lora_a", "lora_b"):
        mixed = sum(
            w * np.asarray(getattr(f.pair(name), key), np.float64) * (f.pair(name).scale
            if key == "lora_b" else 1.0)
            for w, f in zip(expected, bench.case.adapters, strict=True)
        )  # fmt: skip
        np.testing.assert_allclose(getattr(file.pair(name), key), mixed, rtol=2e-2, atol=2e-3)


def _densities(bench: Bench, signature: Any) -> Any:
    density = np.zeros(signature.n_vocab - 1)
    np.add.at(density, np.minimum(signature.histogram.ids, signature.n_vocab - 2),
              signature.histogram.counts / signature.n_tokens)  # fmt: skip
    return density + 1e-10


def test_an_exact_cell_is_the_sum_of_the_updates(bench: Bench) -> None:
    made = paper.make_cell(bench, distance="wd", head="attentional", combine="exact")
    file = open_lora(made.adapters[0].path)
    assert made.coefficients is not None and made.facts["merge_error"] < 1e-3
    for name in file.names:
        wanted = sum(
            w * _dense(f.pair(name))
            for w, f in zip(made.coefficients, bench.case.adapters, strict=True)
        )
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(_dense(file.pair(name)), wanted, atol=5e-3 * scale)


def _dense(pair: Any) -> Any:
    return pair.scale * np.asarray(pair.lora_b, np.float64) @ np.asarray(pair.lora_a, np.float64)


def test_a_neural_cell_takes_the_head_of_its_fold(bench: Bench) -> None:
    with pytest.raises(NotFound, match="benchmark_operators.py heads"):
        paper.make_cell(bench, distance="js", head="neural")
    head = NeuralHead("js", True, np.linspace(-64, 64, 5).astype(np.float32))
    bench.heads.mkdir()
    fold = paper.fold_of(bench.case.bed)[bench.case.task]
    paper.head_path(bench.heads, fold).write_bytes(save_heads({"js": head}))
    made = paper.make_cell(bench, distance="js", head="neural")
    distances = bench.meter.shared("paper js", lambda: None)
    np.testing.assert_allclose(made.coefficients, neural(distances, head=head))


def test_no_fold_shares_a_source(bed: beds_module.Bed) -> None:
    fold = paper.fold_of(bed)
    assert fold["task1"] == fold["task2"] and len(set(fold.values())) == 3


# Controls and oracles.


def test_the_oracle_has_the_least_test_loss(bench: Bench) -> None:
    made = controls.make_oracle(bench)
    losses = {}
    for path in bench.pool.paths:
        bench.context.apply([WeightedAdapter(path)])
        losses[path] = mean_loss(score(bench.context, bench.case.test_texts))
    assert made.adapters[0].path == min(losses, key=losses.__getitem__)


def test_examples_before_the_prompt_are_as_many_as_fit(bench: Bench) -> None:
    made = controls.make_in_context(bench)
    assert made.test is not None and 0 < made.facts["shown"] < len(bench.case.support)
    for line, text in zip(bench.case.test, made.test, strict=True):
        assert text.n_tokens <= bench.n_prompt
        n = round(made.facts["shown"])
        assert controls._after(bench, line, n + 1).n_tokens > bench.n_prompt
        told = bench.case.bed.model.vocabulary.decode(text.prompt).decode()
        assert bench.case.support[0].prompt in told and told.rindex(line.prompt) > 0
    assert [t.completion for t in made.test] == [t.completion for t in bench.case.test_texts]


def test_splits_hide_more_and_more(bed: beds_module.Bed) -> None:
    left = {
        split: beds_module.make_case(
            bed, "task2", n_labels=2, n_test=2, seed=0, split=split
        ).pool.names
        for split in ("task", "source", "category")
    }
    assert left == {"task": ["task0", "task1", "task3"], "source": ["task0", "task3"],
                    "category": ["task0"]}  # fmt: skip


def test_cosines_of_factors_by_hand(bench: Bench) -> None:
    """An adapter with itself has cosine 1; of two, by the flattened factors."""
    one, other = bench.case.adapters[:2]
    assert controls.factor_cosines([one, one]) == {"cosine_a": 1.0, "cosine_b": 1.0}
    found = controls.factor_cosines([one, other])
    for key in "ab":
        x, y = (
            np.concatenate([np.ravel(getattr(f.pair(n), f"lora_{key}")) for n in f.names])
            for f in (one, other)
        )
        x, y = x.astype(float), y.astype(float)
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        assert found[f"cosine_{key}"] == pytest.approx(cosine, abs=1e-3)


# LoraHub.


class Search:
    """In the place of nevergrad.optimizers.NGOpt: looks at the start and at two points."""

    def __init__(self, parametrization: Any, budget: int) -> None:
        self.start, self.budget = parametrization.value, budget

    def minimize(self, objective: Any) -> Any:
        points = [self.start, self.start + 0.5, self.start - 0.5][: self.budget]
        return types.SimpleNamespace(value=min(points, key=objective))


@pytest.fixture
def nevergrad(monkeypatch: pytest.MonkeyPatch) -> None:
    def array(init: Any, lower: Any, upper: Any) -> Any:
        assert set(lower) == {-1.5} and set(upper) == {1.5}
        return types.SimpleNamespace(value=np.array(init))

    fake = types.ModuleType("nevergrad")
    fake.p = types.SimpleNamespace(Array=array)  # type: ignore[attr-defined]
    fake.optimizers = types.SimpleNamespace(NGOpt=Search)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nevergrad", fake)


@pytest.mark.usefixtures("nevergrad")
def test_lorahub_s_objective_by_hand() -> None:
    """(loss) / 8 + 0.05 mean |w|: a gain of 0.16 nats does not pay for 0.025, one of 0.24 does."""
    for gain, expected in ((0.16, 0.0), (0.24, 0.5)):
        found = lorahub.minimise(lambda w, g=gain: -g * w[0] / 0.5, 3, 8, 40, seed=0)
        assert found.tolist() == [expected] * 3


@pytest.mark.usefixtures("nevergrad")
@pytest.mark.parametrize("combine", ["linear", "exact"])
def test_lorahub_measures_what_it_writes(bench: Bench, combine: str) -> None:
    seen = []
    for w in (np.array([0.5, 0.5, 0.5]), np.array([0.3, -0.2, 0.0])):
        files = bench.case.adapters
        search = (lorahub._linear if combine == "linear" else lorahub._exact)(bench, files)
        made = bench.combined(w, combine=combine)
        seen.append((search(w), bench.support_loss(made.adapters)))
    assert [one for one, _ in seen] == pytest.approx([other for _, other in seen], abs=0.02)
    made = lorahub.make_lorahub(bench, n_adapters=2, n_steps=3, combine=combine)
    assert made.coefficients is not None and np.count_nonzero(made.coefficients) in (0, 2)


def test_lorahub_without_nevergrad_says_what_to_install(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(EdgeLoRAError, match=r"edgelora\[bench\]"):
        lorahub.make_lorahub(bench)


@pytest.mark.filterwarnings("ignore:COBYLA")  # of scipy, at what nevergrad asks of it
def test_lorahub_with_nevergrad_itself() -> None:
    pytest.importorskip("nevergrad", reason="nevergrad is for the benchmark only")
    found = lorahub.minimise(lambda w: float(((w - 0.7) ** 2).sum()), 2, 1, 60, seed=0)
    np.testing.assert_allclose(found, 0.7, atol=0.4)


# The paper's own measures.


def test_answers_by_the_paper_s_rules() -> None:
    found = paper_protocol.answer_measures(["Yes", "yes it is", "no"], ["yes", "yes", "no"])
    assert found["subsequence"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["rouge_l"] == pytest.approx((1 + 0.5 + 1) / 3, abs=1e-4)


def test_weight_errors_against_dense_matrices(bench: Bench) -> None:
    own, other = bench.case.adapters[:2]
    shapes = bench.case.bed.model.base.shapes
    found = paper_protocol.weight_errors([WeightedAdapter(other.path, 0.5)], own, shapes)
    gaps = [(0.5 * _dense(other.pair(n)) - _dense(own.pair(n))).ravel() for n in own.names]
    assert found["mse_updates"] == pytest.approx((np.concatenate(gaps) ** 2).mean(), rel=1e-3)
    stored = [
        (np.asarray(getattr(own.pair(n), k), float) - getattr(other.pair(n), k)).ravel()
        for n in own.names for k in ("lora_a", "lora_b")
    ]  # fmt: skip
    assert found["mse_factors"] == pytest.approx((np.concatenate(stored) ** 2).mean(), rel=1e-3)
    base = paper_protocol.weight_errors([], own, shapes)
    squares = [_dense(own.pair(n)).ravel() ** 2 for n in own.names]
    assert base["mse_updates"] == pytest.approx(np.concatenate(squares).mean(), rel=1e-3)


# The tables.


def line(task: str, arm: str, loss: float, **more: Any) -> dict[str, Any]:
    independent = arm in ("base", "own")
    row = {"bed": "b", "split": None if independent else "source", "task": task, "arm": arm,
           "seed": 0, "labels": None if independent else 16, "source": [task[0]],
           "category": ["c"], "loss": loss, "exact": None, "rouge_l": None, "tokens": 100,
           "cpu_s": 1.0}  # fmt: skip
    return row | more


def keyed(lines: list[dict[str, Any]]) -> dict[Any, Any]:
    return {results.key_of(row): row for row in lines}


LINES = [
    line("a", "base", 5.0, items={}), line("a", "own", 1.0),
    line("b", "base", 2.0, items={}), line("b", "own", 1.0),
    line("c", "base", 3.0, items={}), line("c", "own", 1.0),
    line("a", "op-mixture", 2.0), line("b", "op-mixture", 2.1), line("c", "op-mixture", 2.0),
    line("a", "op-gibbs", 4.0), line("b", "op-gibbs", 1.0), line("c", "op-gibbs", 2.6),
    line("a", "build", 1.0, coefficients={"b": 0.5, "c": -0.25}), line("b", "build", 1.5),
    line("c", "build", 1.2),
    line("a", "paper-js-normalized", 3.0), line("b", "paper-js-normalized", 2.0),
    line("c", "paper-js-normalized", 2.5),
]  # fmt: skip


def test_a_table_holds_shares_by_hand() -> None:
    (table,) = summary.tables(keyed(LINES))
    assert table.recovered("op-mixture").ratio == pytest.approx((3 - 0.1 + 1) / 7)
    assert table.recovered("op-mixture").below == pytest.approx(1 / 3)
    assert table.ahead("build", "op-mixture")[1] == pytest.approx((1 + 0.6 + 0.8) / 7)
    assert summary.best_of(table, ["op-mixture", "op-gibbs"]) == "op-mixture"
    told = report.sections(keyed(LINES))["operators-arms"].splitlines()
    assert told[2].startswith("| arm | tasks |") and told[4].startswith("| own | 3 | 1.000")
    assert any(row.startswith("| op-mixture | 3 | 0.557 [") for row in told)


def test_a_table_has_the_tasks_that_were_measured_with_that_much_hidden() -> None:
    """Base and own of a task that only leave-one-task-out has are not of leave-one-source-out."""
    more = [line("d", "base", 4.0), line("d", "own", 1.0), line("a", "build", 2.0, split="task"),
            line("d", "build", 1.0, split="task"), line("b", "few-3", 1.5, split=None)]  # fmt: skip
    by_source, by_task = summary.tables(keyed([*LINES, *more]))
    assert (by_source.split, by_source.tasks) == ("source", ["a", "b", "c"])
    assert (by_task.split, by_task.tasks) == ("task", ["a", "d"])
    assert by_source.of("few-3") == ["b"] and not by_task.of("few-3")


def test_arms_of_both_benchmarks_are_told_by_the_gradient_one_too() -> None:
    items = {"nll": [5.0, 5.0], "n_tokens": [1, 1], "rouge_l": []}
    lines = [
        line("a", "base", 5.0, items=items), line("a", "own", 1.0, loss_vs_base=[-4.1, -4, -3.9]),
        line("a", "gradient-3", 2.0, loss_vs_base=[-4, -3, -2], rank=4),
        line("a", "forward", 6.0, loss_vs_base=[0.5, 1, 1.5]),
        line("a", "op-gibbs", 1.0), line("a", "gradient-3", 1.0, split="task"),
    ]  # fmt: skip
    rows = results.as_gradient_rows(keyed(lines))
    told = gradient_report.report(rows).splitlines()
    (gradient,), (forward,) = (
        [row for row in told if row.startswith(f"| {arm} ")] for arm in ("gradient-3", "forward")
    )
    assert "| 1 | 0.750 [" in gradient and gradient.endswith("| 4 | 100 | 0 |")
    assert forward.endswith("| 1 |") and not [row for row in told if "op-gibbs" in row]


def test_seeds_are_averaged_before_tasks() -> None:
    """Two seeds of a: the arm recovers 3 and 1 of 4 nats, and 0 of b's 1: (2 + 0) / 5."""
    lines = [
        *(line("a", "base", 5.0, seed=s) for s in (0, 1)),
        *(line("a", "own", 1.0, seed=s) for s in (0, 1)),
        line("b", "base", 2.0), line("b", "own", 1.0), line("b", "mean", 2.0),
        line("a", "mean", 2.0), line("a", "mean", 4.0, seed=1),
    ]  # fmt: skip
    (table,) = summary.tables(keyed(lines))
    assert table.recovered("mean").ratio == pytest.approx(2 / 5)


def test_an_operator_chosen_inside_the_fold() -> None:
    """Of 3 tasks each is left out once, and the arm ahead on the other two is taken for it."""
    (table,) = summary.tables(keyed(LINES))
    found = summary.nested(table, ["op-mixture", "op-gibbs"])
    assert found is not None
    chosen, share = found
    # Gains of mixture and gibbs: without a 0.9 and 1.4, without b 4 and 1.4, without c 2.9 and 2.
    assert chosen == {"a": "op-gibbs", "b": "op-mixture", "c": "op-mixture"}
    assert share.ratio == pytest.approx((1 - 0.1 + 1) / 7)


def test_every_section_has_its_place_and_its_words() -> None:
    extra = [
        line("a", "build", 1.5, split="task"), line("a", "build", 2.5, labels=4),
        line("a", "mean", 3.0), line("a", "mean", 3.5, labels=4),
        line("b", "op-kl", 1.0, paper={"subsequence": 0.5, "rouge_l": 0.25,
             "rouge_lsum": 0.25, "mse_factors": None, "mse_updates": 2e-5}),
        line("a", "uniform combine=linear", 4.0, labels=None, rank=4, merge_error=0.5,
             cosine_a=0.1, cosine_b=0.2),
        line("c", "few-10", 1.4, exact=0.5, rouge_l=0.5, rouge_vs_base=[-0.1, -0.05, -0.01]),
    ]  # fmt: skip
    told = report.sections(keyed(LINES + extra))
    assert "| build | paper-js-normalized | +0.543 [" in told["operators-differences"]
    assert "| c | 3 |" in told["operators-categories"]
    assert "hidden source" in told["operators-splits"] and "hidden task" in told["operators-splits"]
    assert "labels 4 | labels 16" in told["operators-labels"]
    assert "| op-kl | 0.500 | 0.250 | 0.250 |  | 2.00e-05 |" in told["operators-paper"]
    assert (
        "| b | uniform combine=linear | 1 | 0.250 | 4 | 0.5 | 0.1 | 0.2 |"
        in (told["operators-merges"])
    )
    few = [row for row in told["operators-arms"].splitlines() if row.startswith("| few-10")]
    assert few and few[0].endswith("| 0.500 | 0.500 | 1 | 100 | 1.0 |")
    nothing = report.sections({})
    assert set(nothing) == set(told) and set(nothing.values()) == {"Not measured yet."}


def test_the_page_has_a_place_for_every_section() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name in report.sections({}):
        assert bench_report.put(page, name, "x")


def test_the_pictures_are_those_of_the_results(tmp_path: Path) -> None:
    import matplotlib

    for path in pictures.draw_all(results.read_results(script.RESULTS), tmp_path):
        committed = (ROOT / "docs" / path.name).read_text(encoding="utf-8")
        if f"Matplotlib v{matplotlib.__version__}," not in committed:
            pytest.skip("drawn by another version of matplotlib")
        assert path.read_text(encoding="utf-8") == committed, "run benchmark_operators.py report"


def test_report_fills_the_page_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    path.write_text("".join(json.dumps(row) + "\n" for row in LINES) + '{"bed": "b", ')
    page.write_text((ROOT / "docs" / "results.md").read_text(encoding="utf-8"), encoding="utf-8")
    line = ["x", "report", "--results", str(path), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", line)
    assert script.main() == 0
    once = page.read_text(encoding="utf-8")
    drawn = {name: (tmp_path / name).read_bytes() for name in pictures.PICTURES}
    assert "| op-mixture | 3 | 0.557 [" in once
    assert re.findall(r"!\[.*?\]\((operators.*?)\)", once) == list(pictures.PICTURES)
    assert all(b"<dc:date>" not in data for data in drawn.values())
    assert script.main() == 0 and page.read_text(encoding="utf-8") == once
    assert drawn == {name: (tmp_path / name).read_bytes() for name in pictures.PICTURES}


def test_items_are_kept_once(folder: Path, tmp_path: Path) -> None:
    """The base's line has its items; the others their paired interval."""
    words = ["--tasks", "task3", "--labels", "4", "--arms", "mean"]
    rows = run(folder, tmp_path / "r.jsonl", *words)
    base, own, mean = rows
    assert len(base["items"]["nll"]) == 5 and "items" not in own
    total = np.array(base["items"]["nll"]).sum() / np.sum(base["items"]["n_tokens"])
    assert base["loss"] == pytest.approx(total, abs=1e-4)
    low, mid, high = mean["loss_vs_base"]
    assert mid == pytest.approx(mean["loss"] - base["loss"], abs=1e-3) and low <= mid <= high
    assert measuring._interval([1.0, 3.0], [1.0, 1.0])[1] == 2.0
    # Wanted later, answers are made then; the later lines count.
    again = run(folder, tmp_path / "r.jsonl", *words, "--answers")
    assert again[:3] == rows and [row["arm"] for row in again[3:]] == ["base", "own", "mean"]
    assert len(again[3]["items"]["rouge_l"]) == 5 and "rouge_vs_base" in again[5]
    kept = results.read_results(tmp_path / "r.jsonl").values()
    assert [row["exact"] for row in kept] == [row["exact"] for row in again[3:]]


def test_ids_in_a_picture_are_no_hashes(tmp_path: Path) -> None:
    """Of coordinates, that is, whose last bits are another CPU's."""
    import matplotlib
    from matplotlib.figure import Figure

    for salt in ("one", "two"):
        with matplotlib.rc_context({"svg.hashsalt": salt}):
            figure = Figure()
            figure.subplots().plot([1, 2], marker="o")
            save_svg(figure, tmp_path / f"{salt}.svg")
    one = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert one == (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert 'id="p1"' in one or 'id="m1"' in one
