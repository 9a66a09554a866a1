"""`bank evaluate --scheduler`: every arm measured once, with workers that die on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import beds
import clusters
import pico
import pytest
from cli_runner import posix_only, run

from edgelora.adapters.base import read_base
from edgelora.bank import open_bank
from edgelora.build import Options
from edgelora.cluster import open_cluster
from edgelora.desk import Desk
from edgelora.errors import BankError, ClusterError, EdgeLoRAError, TemplateError
from edgelora.leave_one_out import remote
from edgelora.leave_one_out.arms import ARMS, Case
from edgelora.leave_one_out.lines import Row, read_lines
from edgelora.leave_one_out.remote import RemoteMeasure, open_remote_measure
from edgelora.leave_one_out.run import Measure, Settings, evaluate_bank

TASKS = [f"task{i}" for i in range(4)]
WANTED = sorted((task, arm) for task in TASKS for arm in ARMS)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pico bank of four adapters with sources, and their datasets."""
    folder = beds.write_bed(tmp_path_factory.mktemp("bed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_CACHE", str(folder / "cache"))
        done = run("bank", "add", *sorted((folder / "data").glob("*/adapter")), "--bank",
                   folder / "bank", "--base", folder / "base.gguf", "--data-glob",
                   "{parent}/train.jsonl", "--card-glob", "{parent}/task.json",
                   "--threads", 1)  # fmt: skip
        assert done.exit_code == 0, done.stderr
        yield folder


def line(bed: Path, results: Path, *words: object) -> list[object]:
    return ["bank", "evaluate", "--base", bed / "base.gguf", "--bank", bed / "bank", "--data",
            bed / "data", "-o", results, "--threads", 1, "--test", 6, "--json", *words]  # fmt: skip


@pytest.fixture(scope="module")
def alone(bed: Path) -> list[Row]:
    """The lines that this machine makes without a scheduler."""
    done = run(*line(bed, bed / "alone.jsonl"))
    assert done.exit_code == 0, done.stderr
    rows: list[Row] = json.loads(done.stdout)["rows"]
    return rows


def timeless(rows: Iterable[Row]) -> list[Row]:
    """All that two runs have in common, in one order."""
    kept = [{k: v for k, v in row.items() if k != "elapsed_s"} for row in rows]
    return sorted(kept, key=lambda row: (row["task"], row["arm"]))


def arms_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return sorted((row["task"], row["arm"]) for row in rows)


# --- without a scheduler: what a worker does, in this process -------------------------------------


def there(bed: Path, **changed: Any) -> RemoteMeasure:
    how = RemoteMeasure.of(
        read_base(bed / "base.gguf"), open_bank(bed / "bank"), Options(), n_threads=1
    )
    return replace(how, **changed)


def evaluated(bed: Path, results: Path, measure: Measure, **options: Any) -> list[Row]:
    base, bank = read_base(bed / "base.gguf"), open_bank(bed / "bank")
    settings = Settings(n_test=6, tasks=options.pop("tasks", ()))
    return evaluate_bank(base, bank, bed / "data", results, measure, settings, **options)


def test_a_worker_measures_the_same(bed: Path, alone: list[Row], tmp_path: Path) -> None:
    rows = evaluated(bed, tmp_path / "r.jsonl", there(bed), tasks=("task1",))
    assert timeless(rows) == timeless(row for row in alone if row["task"] == "task1")


def test_what_one_arm_is_refused_for_does_not_end_the_others(bed: Path, tmp_path: Path) -> None:
    """From the end, as from workers; one arm costs too many of them the first time."""
    begun: list[str] = []

    def each(
        measure: Measure, cases: Iterable[tuple[str, Case]]
    ) -> Iterator[tuple[str, Row | EdgeLoRAError]]:
        for name, case in reversed(list(cases)):
            begun.append(name)
            if name == "task2, mean" and len(begun) > 1:
                yield name, ClusterError("4 workers died, one after another, while at work on it")
            else:
                yield name, measure(case)

    def measure(case: Case) -> Row:
        return case.facts | {"loss": 1.0, "exact": 0.5}

    results = tmp_path / "r.jsonl"
    with pytest.raises(BankError, match="1 of 16 arms could not be measured") as caught:
        evaluated(bed, results, measure, each=each)
    (problem,) = caught.value.problems
    assert problem.startswith("task2, mean: 4 workers died")
    assert len(begun) == 16 and len(list(read_lines(results))) == 15
    begun.clear()
    rows = evaluated(bed, results, measure, each=each)
    assert begun == ["task2, mean"] and len(list(read_lines(results))) == 16
    assert [(row["task"], row["arm"]) for row in rows] == [(t, a) for t in TASKS for a in ARMS]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "0.0.9"}, "EdgeLoRA 0.1.0 .* not 0.0.9"),
        ({"embedding": "otherwise"}, "otherwise"),
        ({"base": "/nowhere/base.gguf"}, "base cannot be read there: .*nowhere"),
        ({"bank": "/nowhere/bank"}, "bank cannot be read there: .*nowhere"),
        ({"size_bytes": 7}, "another base than here .*7 bytes"),
        ({"contents": "0" * 64}, "other adapters, signatures or calibration than here"),
    ],
)
def test_a_worker_that_would_measure_otherwise_says_so(
    bed: Path, change: dict[str, object], said: str
) -> None:
    how = there(bed, **change)
    with pytest.raises(ClusterError, match=said):
        how.check()
    case = Case("task0", "base", {}, (), (), (), False)
    with pytest.raises(ClusterError, match=said):
        Desk(remote._opened).call(how, case)


def test_contents_change_with_all_that_a_build_takes(bed: Path, tmp_path: Path) -> None:
    base = read_base(bed / "base.gguf")
    bank = open_bank(tmp_path / "bank", create=True)
    bank.add(pico.write_peft(tmp_path / "a", seed=1), base)
    seen = [remote.contents_of(bank, base.identity.id)]
    signature = open_bank(bed / "bank").signature("task0", base.identity.id)
    bank.set_signature("a", signature)
    seen.append(remote.contents_of(bank, base.identity.id))
    bank.set_signature("a", replace(signature, description="another"))
    seen.append(remote.contents_of(bank, base.identity.id))
    bank.add(pico.write_peft(tmp_path / "b", seed=2), base)
    seen.append(remote.contents_of(bank, base.identity.id))
    remote.calibration_path(bank, base.identity.id).write_text("{}")
    seen.append(remote.contents_of(bank, base.identity.id))
    assert len(set(seen)) == 5
    assert remote.contents_of(open_bank(bank.path), base.identity.id) == seen[-1]


def test_a_template_is_checked_before_any_connection(bed: Path) -> None:
    base, bank = read_base(bed / "base.gguf"), open_bank(bed / "bank")
    with pytest.raises(TemplateError):
        with open_remote_measure(base, bank, "tcp://127.0.0.1:1", Options(), template="no prompt"):
            pass


def test_offline_refuses_a_scheduler(bed: Path, tmp_path: Path) -> None:
    done = run(*line(bed, tmp_path / "r.jsonl", "--scheduler", "tcp://127.0.0.1:1", "--offline"))
    assert done.exit_code == 1 and "--scheduler needs the network" in done.stderr


# --- with a scheduler and two workers in processes of their own -----------------------------------


def started(words: list[object]) -> subprocess.Popen[str]:
    """`edgelora ...` in a process of its own."""
    command = [sys.executable, "-m", "edgelora", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=clusters.ROOT
    )


def wait_for_lines(results: Path, n: int, process: subprocess.Popen[str]) -> None:
    while len(list(read_lines(results))) < n and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("n_lines", [1, 6])
def test_a_killed_worker_loses_nothing(
    n_lines: int, bed: Path, alone: list[Row], tmp_path: Path
) -> None:
    results = tmp_path / "r.jsonl"
    template = tmp_path / "template.txt"  # read here: the workers get its text
    template.write_text("{prompt} so: ")
    with clusters.running(tmp_path / "cluster") as processes:
        process = started(line(bed, results, "--scheduler", processes.address))
        wait_for_lines(results, n_lines, process)
        processes.workers[0].kill()
        stdout, stderr = process.communicate(timeout=180)
        assert process.returncode == 0, stderr
        again = run(*line(bed, results, "--scheduler", processes.address))
        other = run(*line(bed, tmp_path / "other.jsonl", "--scheduler", processes.address,
                          "--template", template, "--task", "task1", "--no-generate"))  # fmt: skip
    written = list(read_lines(results))
    assert arms_of(written) == WANTED, "each arm once"
    assert timeless(written) == timeless(alone)
    rows = json.loads(stdout)["rows"]
    assert [(row["task"], row["arm"]) for row in rows] == [(t, a) for t in TASKS for a in ARMS]
    assert json.loads(again.stdout)["rows"] == rows and list(read_lines(results)) == written
    assert other.exit_code == 0, other.stderr
    losses = {row["loss"] for row in json.loads(other.stdout)["rows"]}
    assert losses.isdisjoint(row["loss"] for row in alone)


@pytest.mark.slow
@posix_only
def test_a_killed_command_goes_on_when_it_is_run_again(
    bed: Path, alone: list[Row], tmp_path: Path
) -> None:
    results = tmp_path / "r.jsonl"
    with clusters.running(tmp_path / "cluster") as processes:
        words = line(bed, results, "--scheduler", processes.address)
        process = started(words)
        wait_for_lines(results, 3, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kept = list(read_lines(results))
        assert 3 <= len(kept) < len(WANTED)
        again = run(*words)
    assert again.exit_code == 0, again.stderr
    written = list(read_lines(results))
    assert written[: len(kept)] == kept and arms_of(written) == WANTED
    assert timeless(written) == timeless(alone)


@pytest.mark.slow
def test_workers_without_the_bank_are_refused_before_any_work(bed: Path, tmp_path: Path) -> None:
    with clusters.running(tmp_path / "cluster", n_workers=1) as processes:
        with open_cluster(processes.address) as cluster:
            with pytest.raises(ClusterError, match="not everything there") as caught:
                cluster.check(there(bed, bank=str(tmp_path / "absent")).check)
    (problem,) = caught.value.problems
    assert problem.startswith("tcp://127.0.0.1:") and "absent" in problem
