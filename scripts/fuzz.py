"""Files changed at random: adapters, bases, datasets, signatures, banks and what else is read.

usage: python scripts/fuzz.py [--n 20000] [--seed 0] [--time-limit SECONDS] [--case NUMBER]

Real files (pico models and adapters, banks, signatures and datasets; trained adapters of
EDGELORA_SHARED) are changed: bits, bytes, ranges, lengths and counts, entries and tensors of GGUF,
values and keys of JSON, also of that inside GGUF and safetensors. What commands do with such a file
is done with each, in processes of their own: bases and adapters that the checks in Python let
through are loaded by llama.cpp and computed with. Each input has to be read or refused with an
EdgeLoRAError. Problems are

- any other exception, and any warning;
- the end of the process (a crash in native code);
- more than --patience seconds, or 256 MiB more memory, for one input.

The input of each problem is kept in build/fuzz/found, and `--case NUMBER` (with the same --seed)
runs it again in this process. Exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.seeds import ROOT, draw, make_seeds, read_seeds
from fuzzing.worker import PROBLEM, READ, REFUSED, opened, run, work

FOUND = ROOT / "build" / "fuzz" / "found"
_MAX_PROBLEMS = 100


@dataclass
class Outcome:
    """What a run found; filled by the threads that watch the workers."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    slowest: tuple[float, int, str] = (0.0, -1, "")
    peak_bytes: int = 0
    problems: dict[str, list[int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def n_problems(self) -> int:
        """Inputs with a problem."""
        return sum(map(len, self.problems.values()))


def main() -> None:
    """Make the seeds, run, print the figures."""
    arguments = _arguments()
    if arguments.worker:
        folder, first, step, end = arguments.worker
        work(Path(folder), arguments.seed, int(first), int(step), int(end))
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        folder = Path(made)
        make_seeds(folder / "seeds")
        if arguments.case is not None:
            sys.exit(_replay(folder, arguments.seed, arguments.case))
        started = time.monotonic()
        outcome = fuzz(folder, arguments)
        print("\n".join(report(outcome, arguments, time.monotonic() - started)))
    sys.exit(bool(outcome.problems))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=20_000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--time-limit", type=float, help="seconds after which no input begins")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds for one input")
    parser.add_argument("--case", type=int, help="run this input alone, and show what comes of it")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def fuzz(folder: Path, arguments: argparse.Namespace) -> Outcome:
    """Every input, by processes that are started again where one dies."""
    outcome, end = Outcome(), time.monotonic() + (arguments.time_limit or float("inf"))
    shutil.rmtree(FOUND, ignore_errors=True)
    watchers = [
        threading.Thread(target=_watch, args=(folder, arguments, number, end, outcome))
        for number in range(arguments.workers)
    ]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join()
    return outcome


def _watch(
    folder: Path, arguments: argparse.Namespace, first: int, end: float, outcome: Outcome
) -> None:
    """One worker after the other, each from where the one before it ended."""
    while first < arguments.n and time.monotonic() < end and outcome.n_problems < _MAX_PROBLEMS:
        log = folder / f"log-{first}"
        with log.open("w+b") as errors:
            process = _start(folder, arguments, first, errors)
            running, hung, stopped = -1, False, False
            for line in _lines(process, arguments.patience):
                if line is None:
                    hung = True
                elif "begin" in line:
                    running = line["begin"]
                else:
                    _note(folder, arguments.seed, line, outcome)
                stopped = time.monotonic() > end or outcome.n_problems >= _MAX_PROBLEMS
                if hung or stopped:
                    process.kill()
            code = process.wait()
        if stopped or code == 0:
            return
        said = log.read_text("utf-8", "replace").split("\nExtension modules:")[0][-3000:]
        if running < 0:
            raise SystemExit(f"a worker did not start:\n{said}")
        what = f"no end after {arguments.patience:g} s" if hung else f"died with {code}"
        found = {"end": running, "outcome": PROBLEM, "what": f"{what}\n{said}", "s": 0, "peak": 0}
        _note(folder, arguments.seed, found, outcome)
        first = running + arguments.workers


def _start(
    folder: Path, arguments: argparse.Namespace, first: int, errors: Any
) -> subprocess.Popen[bytes]:
    where = [str(folder), str(first), str(arguments.workers), str(arguments.n)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", __file__, "--seed", str(arguments.seed),
         "--worker", *where],
        stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **threads},
    )  # fmt: skip


def _lines(process: subprocess.Popen[bytes], patience_s: float) -> Iterator[dict[str, Any] | None]:
    """What a worker says; None where it says nothing for too long. Works without select too."""
    said: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line)
        said.put(b"")

    threading.Thread(target=read, daemon=True).start()
    wait_s = 120.0  # for the imports
    while True:
        try:
            line = said.get(timeout=wait_s)
        except queue.Empty:
            yield None
            continue
        if not line:
            return
        wait_s = patience_s
        yield json.loads(line)


def _note(folder: Path, seed: int, line: dict[str, Any], outcome: Outcome) -> None:
    """Count an outcome; keep the input of a problem."""
    number, what = line["end"], str(line["what"])
    chosen, files = draw(_seeds(folder), seed, number) if line["outcome"] == PROBLEM else (None, {})
    with outcome.lock:
        kind = chosen.kind if chosen else line["kind"]
        outcome.counts[kind, line["outcome"]] += 1
        outcome.seconds.append(line["s"])
        outcome.slowest = max(outcome.slowest, (line["s"], number, kind))
        outcome.peak_bytes = max(outcome.peak_bytes, line["peak"])
        if chosen is None:
            return
        outcome.problems.setdefault(f"{kind}: {_essence(what)}", []).append(number)
    place = FOUND / f"{number}-{kind}-{chosen.name}"
    for name, data in {**files, "what.txt": what.encode("utf-8", "replace")}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)


def _seeds(folder: Path) -> Any:
    return read_seeds(folder / "seeds")


def _essence(what: str) -> str:
    """Of a traceback the place and the last line; of a crash what llama.cpp said."""
    lines = [line.strip() for line in what.strip().splitlines()]
    asserted = [line for line in lines if "GGML_ASSERT" in line or "terminate" in line]
    if asserted:
        return asserted[-1]
    ours = [line for line in lines if line.startswith("File") and "edgelora" in line]
    return " | ".join([*lines[:1], *ours[-1:], lines[-1][:200]]) if lines else "?"


def _replay(folder: Path, seed: int, number: int) -> int:
    chosen, files = draw(read_seeds(folder / "seeds"), seed, number)
    print(f"input {number}: {chosen.kind}, made from {chosen.name}", flush=True)
    with opened(folder, "replay") as (world, place):
        line = run(chosen, files, place, world)
    print(f"{line['outcome']} in {line['s']} s\n{line['what']}")
    return int(line["outcome"] == PROBLEM)


def report(outcome: Outcome, arguments: argparse.Namespace, elapsed_s: float) -> list[str]:
    """The figures, a line each."""
    n = sum(outcome.counts.values())
    lines = []
    for kind in sorted({kind for kind, _ in outcome.counts}):
        read, refused = (outcome.counts[kind, what] for what in (READ, REFUSED))
        wrong = outcome.counts[kind, PROBLEM]
        lines.append(f"{kind:<11}{read:>6} read {refused:>6} refused {wrong:>4} problems")
    slow, number, kind = outcome.slowest
    lines.append(
        f"{n} inputs in {elapsed_s:.0f} s; median {1e3 * statistics.median(outcome.seconds):.1f} "
        f"ms, slowest {slow:.2f} s (input {number}, {kind}); peak memory of a worker "
        f"{outcome.peak_bytes / 1e6:.0f} MB"
    )
    if n < arguments.n:
        lines.append(f"stopped after {n} of {arguments.n} inputs")
    problems = sorted(outcome.problems.items(), key=lambda item: -len(item[1]))
    lines += [f"PROBLEM: {len(at)} times, e.g. --case {at[0]}: {what}" for what, at in problems]
    if outcome.problems:
        lines.append(f"their inputs are kept in {FOUND}")
    return [*lines, "fuzz: " + ("failed" if outcome.problems else "passed")]


if __name__ == "__main__":
    main()
