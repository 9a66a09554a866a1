"""A Dask scheduler and workers in processes of their own, and work for them that can go wrong."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgelora.bank.remote import RemoteEmbed
from edgelora.cluster import tell
from edgelora.datasets.records import Dataset
from edgelora.errors import DatasetError
from edgelora.signature import Signature

ROOT = Path(__file__).parent.parent
START_S = 60.0
DEADLY = "a description that kills whoever embeds it"


@dataclass
class Processes:
    """What runs, and where a client finds it."""

    address: str
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]


@contextlib.contextmanager
def running(
    folder: Path,
    *,
    n_workers: int = 2,
    allowed_failures: int = 3,
    protocol: str = "tcp",
    options: tuple[object, ...] = (),
) -> Iterator[Processes]:
    """A scheduler and workers of one thread each, without nannies: a dead one stays dead.

    `options` go to both commands.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = folder / "scheduler.json"
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "EDGELORA_CACHE": str(folder / "cache"),
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures),
        "OMP_NUM_THREADS": "1",
    }

    def start(program: str, *words: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{program}", *words, *options]
        with (folder / f"{program}.log").open("ab") as log:
            return subprocess.Popen(
                [str(word) for word in command], cwd=folder, env=environment, stdout=log, stderr=log
            )

    quiet = ("--no-dashboard", "--host", "127.0.0.1")
    scheduler = start(
        "dask_scheduler", *quiet, "--protocol", protocol, "--port", 0, "--scheduler-file", where
    )
    workers: list[subprocess.Popen[bytes]] = []
    try:
        address = _address(where)
        alone = ("--no-nanny", "--nthreads", 1, "--memory-limit", 0)
        workers += [start("dask_worker", address, *quiet, *alone) for _ in range(n_workers)]
        yield Processes(address, scheduler, workers)
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait(30)


def _address(where: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads(where.read_text())["address"])
        time.sleep(0.05)
    raise TimeoutError(f"{where}: no scheduler after {START_S:g} s")


@dataclass(frozen=True)
class Slow:
    """Doubles a number in its own time, and notes each beginning in a folder; odd ones warn."""

    folder: str
    seconds: float

    def __call__(self, n: int) -> int:
        note = Path(self.folder) / f"{n}-{os.getpid()}-{time.monotonic_ns()}"
        note.touch()
        time.sleep(self.seconds)
        if n % 2:
            tell("an odd number")
        return 2 * n

    def begun(self) -> list[tuple[int, int]]:
        """(number, process) of each beginning, oldest first."""
        notes = [path.name.split("-") for path in Path(self.folder).iterdir()]
        return [(int(n), int(pid)) for n, pid, _ in sorted(notes, key=lambda note: int(note[2]))]


def refuse_odd(n: int) -> int:
    """Work that refuses some of its items."""
    if n % 2:
        raise DatasetError(f"{n} is odd", problems=["it is"], hint="Take an even one.")
    return n


def die_of_three(n: int) -> int:
    """Work that one item ends, with its process."""
    if n == 3:
        psutil.Process().kill()
    time.sleep(0.2)
    return n


def fail(n: int) -> int:
    """Work with a bug."""
    raise ZeroDivisionError(f"{n} / 0")


class DeadlyEmbed(RemoteEmbed):
    """Embeds as the real one does, but for one description."""

    def __call__(self, what: Dataset | str) -> Signature:
        if what == DEADLY:
            psutil.Process().kill()
        return super().__call__(what)
