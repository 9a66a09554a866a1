"""Own adapter hidden: for tasks of a bank, what a build from the others' adapters recovers.

    python scripts/benchmark_hidden.py TASKS BANK RESULTS.jsonl [--base smollm2-135m-instruct]

For each task drawn by the seed, `edgelora build` gets 32 of its training lines and every adapter
whose source dataset differs from the task's, then `edgelora eval --limit 64` compares base, built
adapter and the task's own adapter on its test lines. One line of JSON a task is appended to
RESULTS; tasks that are there already are skipped, so an interrupted run goes on where it stopped,
and a finished one only prints its table.
TASKS holds `<task>/train.jsonl`, `test.jsonl` and `task.json` with the source datasets.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from result_lines import append_line

from edgelora.metrics import paired_bootstrap, recovered_share

N_EXAMPLES = 32
N_TEST = 64


def main() -> None:
    """Run what is missing, then print the table and the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("bank", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--n-tasks", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build-option", action="append", default=[], help="passed to build")
    arguments = parser.parse_args()
    adapters = {path.stem: path for path in sorted((arguments.bank / "adapters").glob("*.gguf"))}
    drawn = sorted(random.Random(arguments.seed).sample(sorted(adapters), arguments.n_tasks))
    done = read_results(arguments.results)
    for number, task in enumerate(drawn, 1):
        if task in done:
            continue
        print(f"{number}/{len(drawn)} {task}", file=sys.stderr, flush=True)
        done[task] = run_task(task, adapters, arguments)
        append_line(arguments.results, done[task])
    print(report([done[task] for task in drawn]))


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The finished tasks; a line that a killed run left half-written is ignored."""
    if not path.is_file():
        return {}
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            rows[row["task"]] = row
        except (ValueError, KeyError):
            print(f"{path}: an unfinished line is ignored", file=sys.stderr)
    return rows


def run_task(task: str, adapters: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Build without the task's source, evaluate on its test lines."""
    hidden = same_source(task, adapters, arguments.tasks)
    excluded = [option for name in hidden for option in ("--exclude", name)]
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "train.jsonl"), Path(folder, "built.gguf")
        lines = (arguments.tasks / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = random.Random(arguments.seed).sample(lines, N_EXAMPLES)
        data.write_text("\n".join(chosen) + "\n", encoding="utf-8")
        built = run_edgelora(
            "build", "--base", arguments.base, "--bank", str(arguments.bank), "--data", str(data),
            "-o", str(out), "--seed", str(arguments.seed), "--anew", *excluded,
            *arguments.build_option,
        )  # fmt: skip
        evaluated = run_edgelora(
            "eval", "--base", arguments.base, "--adapter", str(out),
            "--adapter", str(adapters[task]), "--limit", str(N_TEST),
            "--data", str(arguments.tasks / task / "test.jsonl"),
        )  # fmt: skip
    base, adapter, own = evaluated["arms"]
    return {
        "task": task,
        "source": source_of(task, arguments.tasks),
        "hidden": hidden,
        "chosen": built["chosen"],
        "build_s": built["elapsed_s"],
        "build_tokens": built["n_tokens"],
        "base": base,
        "adapter": adapter | {"name": "adapter"},
        "own": own | {"name": "own"},
    }


def run_edgelora(*words: str) -> dict[str, Any]:
    """One command of the command line with --json; its answer."""
    command = [sys.executable, "-m", "edgelora", *words, "--json", "-q"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def source_of(task: str, tasks: Path) -> list[str]:
    """The source datasets of a task."""
    card = json.loads((tasks / task / "task.json").read_text(encoding="utf-8"))
    return [str(source) for source in card["source"]]


def same_source(task: str, adapters: dict[str, Path], tasks: Path) -> list[str]:
    """The adapters that share a source dataset with the task, its own among them."""
    own = set(source_of(task, tasks))
    return [name for name in adapters if own & set(source_of(name, tasks))]


def report(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, and the summary below it."""
    lines = [
        "| task | written | loss: base | adapter | own | adapter - base | recovered |"
        " ROUGE-L: base | adapter | own | exact: base | adapter | own |",
        "|---|---|" + "---:|" * 11,
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    arms = {name: [row[name] for row in rows] for name in ("base", "adapter", "own")}
    loss = {name: np.array([arm["loss"] for arm in arms[name]]) for name in arms}
    share = recovered_share(loss["base"], loss["adapter"], loss["own"])
    low, high = share_interval(rows)
    better = sum(row["adapter"]["loss_vs_base"][2] < 0 for row in rows)
    worse = sum(row["adapter"]["loss_vs_base"][0] > 0 for row in rows)
    lines += [
        "",
        f"- {better} of {len(rows)} improve beyond the interval, {worse} are worse beyond it.",
        f"- Recovered share of loss, as a ratio of means: {share:.3f} [{low:.3f}, {high:.3f}].",
    ]
    for measure, label in (("rouge_l", "ROUGE-L"), ("exact_match", "exact match")):
        means = {name: np.mean([arm[measure] for arm in arms[name]]) for name in arms}
        told = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
        lines.append(f"- Mean {label}: {told}.")
    seconds, tokens = (np.mean([row[key] for row in rows]) for key in ("build_s", "build_tokens"))
    lines.append(f"- A build took {seconds:.0f} s and {tokens:,.0f} tokens on average.")
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    base, adapter, own = row["base"], row["adapter"], row["own"]
    low, mid, high = adapter["loss_vs_base"]
    share = (base["loss"] - adapter["loss"]) / (base["loss"] - own["loss"])
    numbers = [arm[m] for m in ("rouge_l", "exact_match") for arm in (base, adapter, own)]
    return [
        row["task"],
        row["chosen"],
        *(f"{arm['loss']:.3f}" for arm in (base, adapter, own)),
        f"{mid:+.3f} [{low:+.3f}, {high:+.3f}]",
        f"{share:.2f}",
        *(f"{number:.3f}" for number in numbers),
    ]


def share_interval(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """95 % interval of the recovered share: a bootstrap of tasks, clustered by source."""
    gaps = np.array([row["base"]["loss"] - row["own"]["loss"] for row in rows])
    gains = np.array([row["base"]["loss"] - row["adapter"]["loss"] for row in rows])
    low, _, high = paired_bootstrap(gains, gaps, clusters=[str(row["source"]) for row in rows])
    return low, high


if __name__ == "__main__":
    main()
