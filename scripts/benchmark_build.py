"""Whole commands at the size of Mistral-7B: seconds by stage, what limits them, memory.

    python scripts/make_shape.py mistral-7b FOLDER --base q4_0 --bank 500 --peft 1
    python scripts/benchmark_build.py FOLDER [--data DATA] [--parts first again ...]

Each part is a command of this checkout in a process of its own, with a cache in FOLDER, over files
with random values: they cost what real ones cost, and no answer means anything. Peak memory is
RssAnon, sampled every 20 ms. `first` begins with an empty cache and `again` repeats it; `forward`
and `gradient` are builds with --low-ram for their memory, the latter one pass over N_LINES lines.
Beside a build stand the rates of this machine that bound it: prompt tokens a
second of this base alone, bytes a second of a copy in memory; beside all, what came from the disk
meanwhile. The limit of the memory cgroup that all of this runs in, if any, is told too: as root,

    mkdir /sys/fs/cgroup/small && echo 5000000000 > /sys/fs/cgroup/small/memory.max
    sh -c 'echo $$ > /sys/fs/cgroup/small/cgroup.procs; exec python scripts/benchmark_build.py ...'

Appends lines to results/build.jsonl; `make bench-report` writes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from build_benchmark.report import RESULTS
from measure_memory import anonymous, watch
from result_lines import Row, append_line
from serve_benchmark.facts import machine
from serve_benchmark.servers import Setting, edgelora

from edgelora.engine.context import Row as Token
from edgelora.engine.context import open_context
from edgelora.engine.model import ModelOptions, open_model
from edgelora.memory import limit_bytes

DATA = Path(__file__).resolve().parent.parent / "examples" / "returns" / "train.jsonl"
N_LINES = 24
N_PROMPT = 512


@dataclass(frozen=True)
class Bed:
    """The files that the commands work on, and the folder for what they write."""

    shape: str
    base: Path
    bank: Path
    peft: Path
    data: Path
    folder: Path
    n_threads: int


def main() -> None:
    """Measure the parts asked for, append a line for each, print them."""
    options = _parse()
    folder = options.folder.resolve()
    (base,) = folder.glob(f"{options.shape}-{options.type}.gguf")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        bed = Bed(options.shape, base, folder / "bank", folder / "peft-0",
                  options.data.resolve(), Path(scratch), options.threads)  # fmt: skip
        os.environ["EDGELORA_CACHE"] = str(folder / "cache")
        limit = limit_bytes()
        limit_gb = round(limit / 1e9, 1) if limit < psutil.virtual_memory().total else None
        for part in options.parts:
            row = PARTS[part](bed) | {"part": part, "shape": bed.shape, "type": options.type}
            row |= {"data": bed.data.name, "limit_gb": limit_gb, **machine()}
            row |= {"n_threads": bed.n_threads}
            print(json.dumps(row), flush=True)
            append_line(options.results, row)


def _first(bed: Bed) -> Row:
    shutil.rmtree(os.environ["EDGELORA_CACHE"], ignore_errors=True)
    limits = {"prompt_tokens_per_s": prompt_rate(bed.base), "copy_gb_per_s": copy_rate()}
    return _build(bed) | limits


def _forward(bed: Bed) -> Row:
    return _build(bed, "--low-ram", "--refine", "forward", "--anew")


def _gradient(bed: Bed) -> Row:
    few = bed.folder / "few.jsonl"
    lines = bed.data.read_text(encoding="utf-8").splitlines(keepends=True)
    few.write_text("".join(lines[:N_LINES]), encoding="utf-8")
    steps = ("--low-ram", "--refine", "gradient", "--passes", "1", "--anew")
    return _build(replace(bed, data=few), *steps)


def _build(bed: Bed, *more: str) -> Row:
    out = bed.folder / "adapter.gguf"
    words = ("build", "--base", bed.base, "--bank", bed.bank, "--data", bed.data, "--out", out)
    threads = ("--threads", str(bed.n_threads))
    run, stdout = command(*words, *threads, "--force", "--json", *more)
    told = json.loads(stdout)
    kept = ("chosen", "n_tokens", "elapsed_s", "stages_s", "planned", "rank", "warnings")
    return run | {name: told[name] for name in kept} | {"options": list(more)}


def _embed(bed: Bed, *more: str) -> Row:
    return _convert(bed, "--data", str(bed.data), *more)


def _convert(bed: Bed, *more: str) -> Row:
    """Into a bank of its own."""
    bank = Path(tempfile.mkdtemp(dir=bed.folder))
    return command("bank", "add", bed.peft, "--bank", bank, "--base", bed.base, *more)[0]


def _list(bed: Bed) -> Row:
    run, stdout = command("bank", "ls", "--bank", bed.bank, "--json")
    return run | {"n_adapters": len(json.loads(stdout)["adapters"])}


def _suggest(bed: Bed) -> Row:
    return command("suggest", "--data", bed.data, "--json")[0]


def _serve(bed: Bed) -> Row:
    """One slot of 4,096 tokens, with q8_0 keys and values, while it answers a request."""
    setting, read = Setting(bed.base, os.cpu_count() or 1, n_slots=1, n_ctx=4096), disk_read()
    body = {"prompt": "hello " * 40, "max_tokens": 8, "temperature": 0}
    started = time.monotonic()
    with edgelora(setting, options=["--low-ram", "--kv-type", "q8_0"]) as running:
        url = f"http://127.0.0.1:{running.port}/v1/completions"
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        server, peak = psutil.Process(running.pid), 0
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(urllib.request.urlopen, request, timeout=600)
            while not answer.done():
                peak = max(peak, anonymous(server))
                time.sleep(0.02)
            answer.result().close()
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak_mb": peak / 1e6, "disk_gb": (disk_read() - read) / 1e9}


PARTS: dict[str, Callable[[Bed], Row]] = {
    "first": _first,
    "again": _build,
    "forward": _forward,
    "gradient": _gradient,
    "convert": _convert,
    "embed": _embed,
    "embed-low-ram": lambda bed: _embed(bed, "--low-ram"),
    "ls": _list,
    "suggest": _suggest,
    "serve": _serve,
}


def command(*words: str | Path) -> tuple[Row, str]:
    """Run `edgelora WORDS` of this checkout; its seconds and peak memory in MB, and its stdout.

    Raises:
        SystemExit: it failed.
    """
    started, read = time.monotonic(), disk_read()
    with tempfile.TemporaryFile("w+") as stdout:
        child = psutil.Popen([sys.executable, "-m", "edgelora", *map(str, words)], stdout=stdout)
        peak = watch(child, interval_s=0.02)
        if child.returncode:
            raise SystemExit(f"edgelora {' '.join(map(str, words))}: exit {child.returncode}")
        seconds = time.monotonic() - started
        stdout.seek(0)
        told = {"seconds": seconds, "peak_mb": peak / 1e6, "disk_gb": (disk_read() - read) / 1e9}
        return told, stdout.read()


def disk_read() -> int:
    """Bytes that this machine has read from its disks; 0 where that is not told."""
    counters = psutil.disk_io_counters()
    return int(counters.read_bytes) if counters else 0


def prompt_rate(base: Path) -> float:
    """Tokens a second of a prompt of N_PROMPT by llama.cpp, one row of logits, best of three."""
    best = 0.0
    with open_model(base, ModelOptions()) as model, open_context(model) as context:
        for _ in range(3):
            context.clear()
            started = time.perf_counter()
            context.decode([Token(5, i, 0, output=i == N_PROMPT - 1) for i in range(N_PROMPT)])
            best = max(best, N_PROMPT / (time.perf_counter() - started))
    return best


def copy_rate(n_bytes: int = 1 << 30) -> float:
    """GB a second that one core reads and writes in copying, the best of three."""
    source, target = np.ones(n_bytes, np.uint8), np.empty(n_bytes, np.uint8)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return 2 * n_bytes / min(times) / 1e9


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what make_shape.py has written")
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--type", default="q4_0", help="of the base's weights")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--threads", type=int, default=0, help="of builds; 0: physical cores")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
