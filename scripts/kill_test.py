"""Kill commands at random moments: the bank stays whole and the same command finishes.

usage: python scripts/kill_test.py [--n 200] [--seed 0] [--time-limit SECONDS] [--folder FOLDER]

`bank add`, `build` (by forward passes, and with gradients), `pull bank` and `pull base` run as
processes on pico models, against a Hub on this machine. Each is measured once, whole. Then, in a
folder of its own, it is killed (SIGKILL; TerminateProcess on Windows) at seeded random moments of
its working time, up to three times in a row, and run again to its end. Checked are

- after each kill: the bank verifies, and every file that is not a temporary one has the bytes that
  the whole run gave it;
- after the run that follows: it succeeded (or says that its output is there already), the folder
  holds the files of the whole run, byte for byte, and no other: no temporary file, no part of a
  download, nothing in the system's folder for temporary files.

A command that ended before its moment does not count as killed. The folder of a round that went
wrong is kept. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from killing.jobs import JOBS, Job, Material, Tree, make_material, temporary_files, tree

MAX_IN_A_ROW = 3
_TIMEOUT_S = 300.0
_SHOWN = 10
# Imports take most of a short command's time and write nothing: they are done before the moment
# from which kills are drawn. What runs is the command itself.
_STARTER = (
    "import sys, numpy, llama_cpp, pyarrow.parquet, huggingface_hub, edgelora.pull.adapters,"
    "edgelora.build, edgelora.bank.embedding, edgelora.cli.build, edgelora.cli.pull;"
    "from edgelora.cli.main import main; print('ready', flush=True); main()"
)


@dataclass(frozen=True)
class Reference:
    """What a whole run of a job takes and leaves."""

    seconds: float
    whole: Tree


@dataclass
class Tally:
    """What has happened so far; shared by the threads that run rounds."""

    kills: Counter[str] = field(default_factory=Counter)
    rounds: Counter[str] = field(default_factory=Counter)
    n_with_temporary: int = 0
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def main() -> None:
    """Run, print the figures."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        folder = arguments.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        tally, stopped = kill_all(folder, arguments)
        kept = shutil.copytree(folder, folder.with_name("kill-test-failed")) if (
            tally.problems and not arguments.folder) else folder  # fmt: skip
    for name in tally.kills:
        print(f"{name:<22}killed {tally.kills[name]} times in {tally.rounds[name]} rounds")
    n = sum(tally.kills.values())
    print(
        f"{n} kills in {time.monotonic() - started:.0f} s, {tally.n_with_temporary} of them left "
        f"temporary files behind; {len(tally.problems)} problems"
    )
    if stopped:
        print(f"stopped by --time-limit after {n} of {arguments.n} kills")
    for problem in tally.problems[:_SHOWN]:
        print(f"PROBLEM: {problem}")
    if tally.problems:
        print(f"the folders are kept in {kept}")
    print("kill test: " + ("failed" if tally.problems else "passed"))
    sys.exit(bool(tally.problems))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=200, help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--time-limit", type=float, help="seconds after which no round begins")
    parser.add_argument("--at-once", type=int, default=2, help="commands that run at once")
    parser.add_argument("--folder", type=Path, help="kept afterwards (default: a temporary one)")
    return parser.parse_args()


def kill_all(folder: Path, arguments: argparse.Namespace) -> tuple[Tally, bool]:
    """Rounds of every job in turn until there are enough kills; and whether time ran out."""
    tally, end = Tally(), time.monotonic() + (arguments.time_limit or float("inf"))
    with make_material(folder / "material") as material:
        references = {job.name: measure(job, material, folder / "whole") for job in JOBS}
        numbers = iter(range(1 << 30))

        def work() -> None:
            while sum(tally.kills.values()) < arguments.n and time.monotonic() < end:
                with tally.lock:
                    number = next(numbers)
                job = JOBS[number % len(JOBS)]
                rng = random.Random(f"{arguments.seed}-{number}")
                place = folder / f"round-{number}"
                play(job, material, references[job.name], place, rng, tally, arguments.n)

        with ThreadPoolExecutor(arguments.at_once) as pool:
            for future in [pool.submit(work) for _ in range(arguments.at_once)]:
                future.result()
    return tally, sum(tally.kills.values()) < arguments.n


def measure(job: Job, material: Material, folder: Path) -> Reference:
    """A run that nobody kills: the second of two, whose files are in the system's cache."""
    for number in (1, 2):
        place = folder / f"{job.name.replace(' ', '-')}-{number}"
        _prepare(job, material, place)
        process = _start(job, material, place)
        started = time.monotonic()
        _, said = process.communicate(timeout=_TIMEOUT_S)
        seconds = time.monotonic() - started
        if process.returncode != 0:
            raise SystemExit(f"{job.name}, which nobody killed, failed:\n{said}")
        if left := temporary_files(place):
            raise SystemExit(f"{job.name}, which nobody killed, left {left}")
    print(f"{job.name}: {seconds:.2f} s after its imports", file=sys.stderr)
    return Reference(seconds, tree(place))


def play(
    job: Job,
    material: Material,
    reference: Reference,
    folder: Path,
    rng: random.Random,
    tally: Tally,
    n_wanted: int,
) -> None:
    """One round: up to MAX_IN_A_ROW kills, then a run to the end."""
    _prepare(job, material, folder)
    problems: list[str] = []
    for _ in range(rng.randint(1, MAX_IN_A_ROW)):
        if not _kill(job, material, folder, rng.uniform(0, reference.seconds)):
            break  # it had ended; that its output is whole is checked below
        with tally.lock:
            tally.kills[job.name] += 1
            tally.n_with_temporary += bool(temporary_files(folder))
        problems += [f"after a kill: {p}" for p in job.check(folder, reference.whole)]
        if sum(tally.kills.values()) >= n_wanted:
            break
    problems += _finish(job, material, folder, reference.whole)
    with tally.lock:
        tally.rounds[job.name] += 1
        tally.problems += [f"{job.name} in {folder.name}: {problem}" for problem in problems]
    if not problems:
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(job: Job, material: Material, folder: Path) -> None:
    (folder / "tmp").mkdir(parents=True)
    (folder / "cache").mkdir()
    tried = material.world.base.parent / "cache" / "amx.json"
    if tried.is_file():  # else each run would try llama.cpp's AMX kernels anew
        shutil.copy(tried, folder / "cache")
    job.prepare(material, folder)


def _start(job: Job, material: Material, folder: Path) -> subprocess.Popen[str]:
    """The command, its imports done."""
    process = subprocess.Popen(
        [sys.executable, "-c", _STARTER, *map(str, job.words(material, folder))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=material.environment(folder),
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"{job.name} does not start:\n{process.communicate()[1]}")
    return process


def _kill(job: Job, material: Material, folder: Path, after_s: float) -> bool:
    """Kill it after some seconds; False if it had ended by then."""
    process = _start(job, material, folder)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        running = psutil.Process(process.pid)
        for one in (running, *running.children(recursive=True)):
            one.kill()
        process.communicate()
        return True
    process.communicate()
    return False


def _finish(job: Job, material: Material, folder: Path, whole: Tree) -> list[str]:
    """Run it to the end; what is wrong then."""
    process = _start(job, material, folder)
    try:
        out, said = process.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return [f"the same command does not end within {_TIMEOUT_S:.0f} s"]
    problems = []
    if process.returncode != 0 and "exists already" not in said:
        problems.append(f"the same command fails with {process.returncode}: {out}{said}")
    problems += job.check(folder, whole)
    found = tree(folder)
    problems += [f"{path}: left behind" for path in found.keys() - whole.keys()]
    problems += [f"{path}: missing" for path in whole.keys() - found.keys()]
    return problems + [f"{path}: left behind" for path in temporary_files(folder)]


if __name__ == "__main__":
    main()
