"""A process that runs inputs one after the other and says what came of each, line by line.

It may be killed by the input that it runs: the last line that it wrote names it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from edgelora.errors import EdgeLoRAError
from fuzzing.seeds import Seed, draw, read_seeds
from fuzzing.targets import TARGETS, World, open_world

MAX_MESSAGE = 20_000
MAX_GROWTH_BYTES = 256 << 20  # of the peak of the resident memory, by one input
_ADDRESS_SPACE_BYTES = 6 << 30  # beyond what is mapped at the start
READ, REFUSED, PROBLEM = "read", "refused", "problem"


def work(folder: Path, seed: int, first: int, step: int, end: int) -> None:
    """Inputs first, first + step, ... below `end`; a line of JSON before and after each."""
    # What native code and the debugger that ggml calls in print goes where errors go.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    seeds = read_seeds(folder / "seeds")
    with opened(folder, f"worker-{first % step}") as (world, place):
        for number in range(first, end, step):
            _say(told, {"begin": number})
            chosen, files = draw(seeds, seed, number)
            _say(told, {"end": number, "kind": chosen.kind, "seed": chosen.name}
                 | run(chosen, files, place, world))  # fmt: skip


@contextlib.contextmanager
def opened(folder: Path, name: str) -> Iterator[tuple[World, Path]]:
    """The world, and a folder for inputs; warnings are errors, and memory has a bound."""
    os.environ["EDGELORA_CACHE"] = str(folder / "cache")
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)  # of destructors, where nothing can be raised
    with open_world(folder / "seeds") as world:
        _bound_memory()
        yield world, folder / name


def run(chosen: Seed, files: dict[str, bytes], place: Path, world: World) -> dict[str, object]:
    """One input: its outcome, seconds, and what is wrong if it is a problem."""
    shutil.rmtree(place, ignore_errors=True)
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    before, started = _peak_bytes(), time.perf_counter()
    outcome, what = _outcome(chosen.kind, place, world)
    seconds, grown = time.perf_counter() - started, _peak_bytes() - before
    if grown > MAX_GROWTH_BYTES and outcome != PROBLEM:
        outcome, what = PROBLEM, f"took {grown >> 20} MiB"
    return {"outcome": outcome, "what": what, "s": round(seconds, 4), "peak": _peak_bytes()}


def _outcome(kind: str, place: Path, world: World) -> tuple[str, str]:
    try:
        TARGETS[kind](place, world)
    except EdgeLoRAError as error:
        if len(str(error)) > MAX_MESSAGE:
            return PROBLEM, f"an error of {len(str(error))} characters: {str(error)[:200]}"
        return REFUSED, ""
    except BaseException:
        return PROBLEM, traceback.format_exc()
    return READ, ""


def _peak_bytes() -> int:
    """The most resident memory that this process has had."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _bound_memory() -> None:
    """A size that a file claims must not be asked of the system: there is an end to it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    import psutil

    limit = psutil.Process().memory_info().vms + _ADDRESS_SPACE_BYTES
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _say(told: TextIO, line: dict[str, object]) -> None:
    print(json.dumps(line), file=told, flush=True)
