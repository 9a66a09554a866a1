"""What gradients add: coefficients found on a few labels, judged on what they never saw.

    python scripts/benchmark_gradient_quality.py RESULTS.jsonl --name smollm2 \\
        --base smollm2-135m-instruct --bank models/bank --data ../shared/lab/bank --exact
    python scripts/benchmark_gradient_quality.py RESULTS.jsonl --name tiny \\
        --base ../shared/lab/base-q8_0.gguf --peft --data ../shared/lab/bank --n-tasks 0
    python scripts/benchmark_gradient_quality.py RESULTS.jsonl --report [--picture SVG]

For each task, drawn by --seed of the tasks, the bank loses every adapter whose source dataset is
the task's (leave one source out); --labels lines of train.jsonl are what a person would bring, and
--n-test lines of test.jsonl judge. Every arm ends as a file (or is one), which llama.cpp scores.
One line of JSON for each (bed, task, seed, labels, arm) is appended to RESULTS; what is there is
skipped, so an interrupted run goes on where it stopped, inside a descent too: checkpoints stay in
the cache folder of edgelora, and arms of more passes go on with them. Lines hold numbers only, no
texts of tasks.
DATA holds `<task>/train.jsonl`, `test.jsonl` and `task.json`. With --peft, the bank is made in
the cache folder from the PEFT adapters `DATA/<task>/adapter`. --type q8_0 measures a requantised
copy of the base, which llama.cpp runs faster than Q4_1. Arms may carry settings, e.g.
--arms "gradient-3 step=0.1 batch_size=0" "gradient-10 rank=cat"; gradient_quality/arms.py lists
them.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from gradient_quality.arms import DEFAULT_ARMS, parse_arm
from gradient_quality.bed import Bed, make_bank, make_case, open_bed
from gradient_quality.measuring import (
    Key,
    key_of,
    labels_of,
    measure_case,
    read_results,
)
from gradient_quality.report import report
from result_lines import Row, append_line

from edgelora.bases import resolve
from edgelora.embedding_cache import cache_folder
from edgelora.files import publish


def main() -> None:
    """Measure what is missing, task by task, then print the tables."""
    options = parse()
    done = read_results(options.results)
    if not options.report:
        measure(options, done)
    if options.picture:
        from gradient_quality.picture import draw

        draw(done, options.picture)
    print(report(done))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--picture", type=Path, help="draw loss against passes into this SVG")
    add_bed_options(parser)
    parser.add_argument("--n-tasks", type=int, default=16, help="0: all")
    parser.add_argument("--tasks", nargs="+", default=[], help="these instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[16])
    parser.add_argument("--n-test", type=int, default=50)
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS)
    parser.add_argument("--exact", action="store_true", help="generate answers too")
    options = parser.parse_args()
    try:
        for arm in options.arms:
            parse_arm(arm)
    except ValueError as error:
        parser.error(str(error))
    return options


def add_bed_options(parser: argparse.ArgumentParser) -> None:
    """What names a bed, for `open_bed_of`."""
    parser.add_argument("--name", default="smollm2", help="of the bed, in the lines")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--type", help="measure a copy of the base of this type, e.g. q8_0")
    parser.add_argument("--bank", type=Path, default=Path("models/bank"))
    parser.add_argument("--peft", action="store_true", help="make the bank from DATA/*/adapter")
    parser.add_argument("--data", type=Path, default=Path("../shared/lab/bank"))
    parser.add_argument("--threads", type=int, default=1)


def open_bed_of(options: argparse.Namespace) -> AbstractContextManager[Bed]:
    """The bed that the options name."""
    base, bank = base_of(options), options.bank
    if options.peft:
        bank = make_bank(work_folder(options.name) / "bank", base, options.data)
    return open_bed(options.name, base, bank, options.data, n_threads=options.threads)


def measure(options: argparse.Namespace, done: dict[Key, Row]) -> None:
    """Whole tasks one after another: both seeds and all numbers of labels of each."""
    with open_bed_of(options) as bed:
        tasks = drawn(bed, options)
        for number, task in enumerate(tasks, 1):
            for seed in options.seeds:
                for labels in options.labels:
                    print(f"{number}/{len(tasks)} {task} seed {seed} labels {labels}",
                          file=sys.stderr, flush=True)  # fmt: skip
                    measure_one(bed, task, seed, labels, options, done)


def measure_one(
    bed: Bed, task: str, seed: int, labels: int, options: argparse.Namespace, done: dict[Key, Row]
) -> None:
    """The arms that are missing of one case."""
    missing = [
        arm
        for arm in options.arms
        if (bed.name, task, seed, labels_of(arm, labels), arm) not in done
    ]
    if not missing:
        return
    case = make_case(bed, task, n_labels=labels, n_test=options.n_test, seed=seed)
    folder = work_folder(bed.name) / f"{task}-{seed}-{labels}"
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)  # of what a killed run left
    facts = {"base": bed.model.base.path.name, "n_test": options.n_test}
    rows = measure_case(
        case,
        missing,
        folder,
        exact=options.exact,
        n_labels=labels,
        facts=facts,
    )
    for row in rows:
        append_line(options.results, row)
        done[key_of(row)] = row
        print(f"  {row['arm']}: {row['loss']} {row['exact']} {row['cpu_s']} s",
              file=sys.stderr, flush=True)  # fmt: skip
    clear(folder)


def clear(folder: Path) -> None:
    """Remove what arms made; checkpoints stay."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".state":
            path.unlink()


def drawn(bed: Bed, options: argparse.Namespace) -> list[str]:
    """The tasks to measure, in the order of the draw: a longer list goes on where this ends."""
    if options.tasks:
        return [task for word in options.tasks for task in bed.tasks if task.startswith(word)]
    order = random.Random(0).sample(bed.tasks, len(bed.tasks))
    return order[: options.n_tasks] if options.n_tasks else order


def base_of(options: argparse.Namespace) -> Path:
    """The base's file, or its requantised copy in the work folder."""
    base = resolve(options.base)
    if not options.type:
        return base
    copy = work_folder(options.name) / f"{base.stem}.{options.type}.gguf"
    if not copy.exists():
        from edgelora.engine.quantize import quantize

        with publish(copy) as temporary:
            quantize(base, temporary, options.type)
    return copy


def work_folder(name: str) -> Path:
    """Where copies, banks and checkpoints of a bed lie."""
    folder = cache_folder() / "gradient_quality" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
