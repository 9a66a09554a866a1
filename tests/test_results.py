"""What docs/results.md says is what the benchmark's command prints from the committed results."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "hidden.jsonl"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_report_of_the_results() -> None:
    benchmark = load("benchmark_hidden")
    rows = sorted(benchmark.read_results(RESULTS).values(), key=lambda row: row["task"])
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"<!-- hidden -->\n(.*?)\n<!-- /hidden -->", page, re.DOTALL)
    assert told == benchmark.report(rows)


def test_a_line_that_a_killed_run_left_is_ignored(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text('{"task": "a", "x": 1}\n{"task": "b", "x"', encoding="utf-8")
    assert load("benchmark_hidden").read_results(results) == {"a": {"task": "a", "x": 1}}


def test_every_adapter_of_the_task_s_source_is_hidden(tmp_path: Path) -> None:
    benchmark = load("benchmark_hidden")
    for task, source in (("a", '["x", "y"]'), ("b", '["y"]'), ("c", '["z"]')):
        (tmp_path / task).mkdir()
        (tmp_path / task / "task.json").write_text(f'{{"source": {source}}}', encoding="utf-8")
    adapters = {task: tmp_path / f"{task}.gguf" for task in "abc"}
    assert benchmark.same_source("a", adapters, tmp_path) == ["a", "b"]
    assert benchmark.same_source("c", adapters, tmp_path) == ["c"]
