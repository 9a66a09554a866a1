"""Embeddings from fewer layers: what the shortlist loses by them, and what they save.

    python scripts/benchmark_early_exit.py quality TASKS RESULTS.jsonl --base BASE --name NAME
    python scripts/benchmark_early_exit.py speed TASKS RESULTS.jsonl --base BASE --name NAME

TASKS holds `<task>/train.jsonl`, `test.jsonl` and `task.json` with source and category. quality: of
each task, lines of train.jsonl make the signature of the bank, and lines of test.jsonl ask for it;
--type makes a copy of the base first, in a type of weights that is faster. speed: the same texts
embedded by llama-cpp-python's Llama.embed and by ours, on one thread, in turn, the fastest round of
each; --bench adds llama-bench's pp (`make peers`). One line of JSON is appended to RESULTS;
`make bench-report` writes the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from build_peers import find_peers, is_built
from early_exit.quality import measure_quality, read_tasks
from early_exit.report import quality_table, speed_table
from early_exit.speed import measure_speed
from serve_benchmark.facts import machine

from edgelora.adapters.base import read_base
from edgelora.bases import resolve
from edgelora.engine.model import ModelOptions, open_model
from edgelora.engine.quantize import quantize


def main() -> None:
    """Measure one base, append a line, print its table."""
    options = _parse()
    base = resolve(options.base)
    n = read_base(base).n_layer
    depths = [*(options.layers or [max(1, n * i // 4) for i in (1, 2, 3)]), 0]
    if options.part == "speed":
        row = _speed(base, depths, options)
    else:
        row = _quality(base, depths, options)
    row = {"part": f"early-{options.part}", "model": options.name, **machine(), **row}
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(speed_table(row) if options.part == "speed" else quality_table(row))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("quality", "speed"))
    parser.add_argument("tasks", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--name", required=True, help="of the base, in the tables")
    parser.add_argument("--layers", type=int, nargs="*", help="default: quarters of the base's")
    parser.add_argument("--known", type=int, default=64, help="lines of a signature of the bank")
    parser.add_argument("--asked", type=int, default=16, help="lines of a query")
    parser.add_argument("--draws", type=int, default=2, help="queries of a task")
    parser.add_argument("--type", help="quality: weights of a temporary copy of the base")
    parser.add_argument("--texts", type=int, default=48, help="speed: prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bench", action="store_true", help="speed: beside llama-bench too")
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def _quality(base: Path, depths: list[int], options: argparse.Namespace) -> dict[str, Any]:
    tasks = read_tasks(options.tasks, options.known, options.asked, options.draws)
    with tempfile.TemporaryDirectory() as folder:
        if options.type:
            copy = Path(folder) / "copy.gguf"
            quantize(base, copy, options.type)
            base = copy
        with open_model(base, ModelOptions(n_threads=options.threads)) as model:
            return {"type": options.type, **measure_quality(model, tasks, depths)}


def _speed(base: Path, depths: list[int], options: argparse.Namespace) -> dict[str, Any]:
    tasks = read_tasks(options.tasks, 1, 1, 1)
    n_each = -(-options.texts // len(tasks))
    tasks = read_tasks(options.tasks, n_each, 1, 1)
    texts = [e.messages[-1].content for task in tasks for e in task.known][: options.texts]
    peers = find_peers() if options.bench else None
    if peers and not is_built(peers):
        sys.exit("llama-bench is not built: make peers")
    return measure_speed(base, texts, depths, options.rounds, options.threads or 1, peers)


if __name__ == "__main__":
    main()
