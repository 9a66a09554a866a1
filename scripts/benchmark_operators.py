"""The operators side by side: what a bank gives to tasks whose adapters and sources are hidden.

    python scripts/benchmark_operators.py run --name tiny --base ../shared/lab/base-q8_0.gguf \\
        --peft --data ../shared/lab/bank --seeds 0 1 --answers --paper
    python scripts/benchmark_operators.py run --name smollm2 --base smollm2-135m-instruct \\
        --type q8_0 --bank models/bank --data ../shared/lab/bank --n-tasks 16 --n-prompt 2048
    python scripts/benchmark_operators.py run --name mistral --base mistral-7b-instruct-v0.2 \\
        --bank mistral-bank --data TASKS --n-tasks 20
    python scripts/benchmark_operators.py heads --name tiny --base ... --data ...   (needs torch)
    python scripts/benchmark_operators.py report

`run` hides, for each task, every adapter of its source (--split source; `task` hides its own alone,
`category` its category too). --labels lines of train.jsonl are what a person would bring (0: 16
prompts without answers), and --n-test lines of test.jsonl judge, in the same engine, file and
template for every arm. A line of JSON for each (bed, split, task, arm, seed, labels) is appended to
the results; what is there is skipped, so that a stopped run goes on. Two runs at a time need a
file of results each. Lines hold numbers and names, no texts. --arms takes names and groups
(operators_benchmark/registry.py lists both); base and own are always measured. The paper's Neural
arms need `heads` first: five folds by source, in an environment with torch. `report` writes the
tables into the page and the pictures beside it.

DATA holds `<task>/train.jsonl`, `test.jsonl` and `task.json`, whose source and category say what is
kin. With --peft, the bank is made in the cache folder from the PEFT adapters `DATA/<task>/adapter`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from benchmark_gradient_quality import add_bed_options, open_bed_of, work_folder
from gradient_quality.bed import Bed, make_case
from operators_benchmark.heads import train_heads
from operators_benchmark.lorahub import find_nevergrad
from operators_benchmark.measuring import Wanted, measure_case
from operators_benchmark.paper import DISTANCES, fold_head
from operators_benchmark.registry import GROUPS, LABELS, Arm, expand
from operators_benchmark.results import Key, key_of, read_results
from result_lines import Row, append_line

from edgelora.errors import EdgeLoRAError
from edgelora.leave_one_out.splits import SPLITS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "operators.jsonl"
PAGE = ROOT / "docs" / "results.md"
DEFAULT_ARMS = ["@controls", "@exact", "@others", "@ours"]


def main() -> int:
    """Measure, train heads or report."""
    options = parse()
    try:
        return options.act(options)
    except EdgeLoRAError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure what is missing, task by task")
    heads = commands.add_parser("heads", help="train the paper's Neural heads; needs torch")
    for command in (run, heads):
        add_bed_options(command)
    _add_run_options(run)
    run.set_defaults(act=measure)
    heads.add_argument("--hidden", type=int, default=4_000)
    heads.add_argument("--steps", type=int, default=40)
    heads.set_defaults(act=make_heads)
    report = commands.add_parser("report", help="write tables and pictures")
    report.add_argument("--results", type=Path, default=RESULTS)
    report.add_argument("--page", type=Path, default=PAGE)
    report.set_defaults(act=write_report)
    options = parser.parse_args()
    if "arms" in options:
        try:
            options.arms = expand(options.arms)
        except ValueError as error:
            parser.error(str(error))
    return options


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--results", type=Path, default=RESULTS)
    run.add_argument("--split", choices=SPLITS, default="source")
    run.add_argument("--n-tasks", type=int, default=0, help="drawn by a seed; 0: all")
    run.add_argument("--tasks", nargs="+", default=[], help="these instead, by how they begin")
    run.add_argument("--with-siblings", action="store_true",
                     help="only tasks whose source has another adapter in the bank")  # fmt: skip
    run.add_argument("--seeds", type=int, nargs="+", default=[0])
    run.add_argument("--labels", type=int, nargs="+", default=[16], help="0: prompts only")
    run.add_argument("--n-test", type=int, default=50)
    run.add_argument("--n-prompt", type=int, default=768, help="tokens of a prompt with examples")
    run.add_argument("--arms", nargs="+", default=DEFAULT_ARMS, metavar="ARM",
                     help=f"names, or groups: {', '.join(GROUPS)}")  # fmt: skip
    run.add_argument("--answers", action="store_true", help="generate answers too")
    run.add_argument("--paper", action="store_true", help="the paper's own measures too")


def measure(options: argparse.Namespace) -> int:
    """Whole tasks one after another: all seeds and numbers of labels of each."""
    done = read_results(options.results)
    with open_bed_of(options) as bed:
        refuse_unready(bed, options.arms)
        tasks = drawn(bed, options)
        cases = [(t, s, n) for t in tasks for s in options.seeds for n in options.labels]
        for number, (task, seed, n_labels) in enumerate(cases, 1):
            print(f"{number}/{len(cases)} {task} seed {seed} labels {n_labels}",
                  file=sys.stderr, flush=True)  # fmt: skip
            measure_one(bed, task, seed, n_labels, options, done)
    return 0


def measure_one(
    bed: Bed, task: str, seed: int, n_labels: int, options: argparse.Namespace, done: dict[Key, Row]
) -> None:
    """The arms that are missing of one case."""
    case = make_case(
        bed, task, n_labels=n_labels, n_test=options.n_test, seed=seed, split=options.split
    )
    results = blake2b(str(options.results.resolve()).encode(), digest_size=4).hexdigest()
    folder = work_folder(bed.name) / f"{results}-{task}-{options.split}-{seed}-{n_labels}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = Wanted(options.answers, options.paper, options.n_prompt)
    arms = [arm for arm in options.arms if can_measure(arm, n_labels)]
    heads = work_folder(bed.name) / "heads"
    for row in measure_case(case, arms, done, folder, heads, n_labels, wanted):
        append_line(options.results, row)
        done[key_of(row)] = row
        print(f"  {row['arm']}: {row['loss']} {row['exact']}  {row['tokens']} tokens, "
              f"{row['cpu_s']} s of CPU", file=sys.stderr, flush=True)  # fmt: skip
    shutil.rmtree(folder)


def refuse_unready(bed: Bed, arms: Sequence[Arm]) -> None:
    """Raise EdgeLoRAError for arms that lack a package or heads, before hours of work."""
    names = [arm.name for arm in arms]
    if any(name.startswith("lorahub") for name in names):
        find_nevergrad()
    for distance in DISTANCES:
        if any(name.startswith(f"paper-{distance}-neural") for name in names):
            for task in bed.tasks:
                fold_head(work_folder(bed.name) / "heads", bed, task, distance)


def can_measure(arm: Arm, n_labels: int) -> bool:
    """Whether an arm has what it needs."""
    return n_labels > 0 or arm.uses != LABELS


def drawn(bed: Bed, options: argparse.Namespace) -> list[str]:
    """The tasks to measure, in the order of the draw: a longer list goes on where this ends."""
    if options.tasks:
        return [task for word in options.tasks for task in bed.tasks if task.startswith(word)]
    order = random.Random(0).sample(bed.tasks, len(bed.tasks))
    if options.with_siblings:
        order = [task for task in order if len(bed.hidden(task)) > 1]
    return order[: options.n_tasks] if options.n_tasks else order


def make_heads(options: argparse.Namespace) -> int:
    """Train the Neural heads of every fold."""
    with open_bed_of(options) as bed:
        train_heads(bed, work_folder(bed.name) / "heads", hidden=options.hidden,
                    steps=options.steps)  # fmt: skip
    return 0


def write_report(options: argparse.Namespace) -> int:
    """The tables into the page, the pictures beside it."""
    from bench_report import put_all
    from operators_benchmark.pictures import draw_all
    from operators_benchmark.report import sections

    rows = read_results(options.results)
    told = sections(rows)
    page = put_all(options.page.read_text(encoding="utf-8"), told)
    options.page.write_text(page, encoding="utf-8")
    drawn = draw_all(rows, options.page.parent)
    print(f"{len(rows)} lines: {len(told)} tables and {len(drawn)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
