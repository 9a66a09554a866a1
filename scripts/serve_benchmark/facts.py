"""What a run is measured on and with: machine, code, models, adapters, targets met or missed."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from build_peers import Peers
from make_shape import SHAPES, write_base, write_gguf_lora

from edgelora.adapters.merge import merge_adapters
from edgelora.bases import resolve
from edgelora.engine.model import ModelOptions, open_model
from serve_benchmark.prompts import PromptMaker
from serve_benchmark.servers import Setting

ROOT = Path(__file__).resolve().parent.parent.parent
BANK = ROOT / "models" / "bank" / "adapters"
SMALL = "SmolLM2-135M Q4_1"
SHAPE = "tinyllama-1.1b"
N_SOURCES = 4
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A base and what is hot-applied to it: four sources and their combination at the same rank."""

    name: str
    path: Path
    sources: tuple[Path, ...]
    combined: Path
    rank: int


@dataclass(frozen=True)
class Run:
    """What every part is given.

    Attributes:
        folder: where models are made, if they are not there, and adapters are combined.
        quick: small counts, to see that everything works.
    """

    peers: Peers
    models: tuple[Model, ...]
    folder: Path
    n_threads: int
    rounds: int
    quick: bool

    def setting(self, model: Model, **sizes: int) -> Setting:
        """What the servers of this model are started with."""
        return Setting(model.path, self.n_threads, **sizes)

    @contextlib.contextmanager
    def maker(self, model: Model, seed: int) -> Iterator[PromptMaker]:
        """Prompts of this model's vocabulary; the weights stay on disk."""
        with open_model(model.path, ModelOptions(low_ram=True)) as opened:
            yield PromptMaker(opened.vocabulary, seed)


def small_model(folder: Path) -> Model:
    """SmolLM2 as the `demo` extra ships it, with four adapters of models/bank."""
    sources = tuple(sorted(BANK.glob("*.gguf"))[:N_SOURCES])
    return _with_combination(SMALL, resolve("smollm2-135m-instruct"), sources, 8, folder)


def shaped_model(folder: Path, shape: str = SHAPE, rank: int = 16) -> Model:
    """A Q4_0 base of a named shape with random weights, and four random adapters of q, k and v."""
    base = folder / f"{shape}-q4_0.gguf"
    if not base.is_file():
        say(f"writing {base}")
        write_base(base, SHAPES[shape])
    sources = [folder / f"{shape}-lora-{i}.gguf" for i in range(N_SOURCES)]
    for seed, path in enumerate(sources):
        if not path.is_file():
            write_gguf_lora(path, SHAPES[shape], rank=rank, seed=seed)
    return _with_combination(f"{shape} Q4_0", base, tuple(sources), rank, folder)


def _with_combination(
    name: str, base: Path, sources: tuple[Path, ...], rank: int, folder: Path
) -> Model:
    combined = folder / f"{base.stem.lower()}-combined.gguf"
    if not combined.is_file():
        say(f"combining {len(sources)} adapters at rank {rank}")
        merge_adapters(list(sources), [1 / len(sources)] * len(sources), combined, rank=rank)
    return Model(name, base, sources, combined, rank)


def about(run: Run) -> Row:
    """When, on what and with which code a run was measured."""
    return machine() | {
        "n_threads": run.n_threads,
        "rounds": run.rounds,
        "quick": run.quick,
    }


def machine() -> Row:
    """When, on what machine and with which code something is measured."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "cpu": _cpu(),
        "n_cores": os.cpu_count(),
        "llama_cpp_python": version("llama-cpp-python"),
        "python": platform.python_version(),
    }


def _commit() -> str:
    """The commit, with + where a tracked file differs from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "edgelora"])
    return name.stdout.strip() + ("+" if changed.returncode else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    amx = " with AMX" if "amx_tile" in named.get("flags", "") else ""
    family = f"family {named.get('cpu family')}, model {named.get('model')}"
    return f"{named.get('model name', platform.processor())} ({family}{amx})"


def spread(values: Sequence[float]) -> Row:
    """Median, least and most."""
    return {
        "median": statistics.median(values), "min": min(values), "max": max(values),
        "n": len(values),
    }  # fmt: skip


def target(
    name: str, value: float, *, least: float | None = None, most: float | None = None
) -> Row:
    """A number with the bound that it has to keep, and whether it does."""
    met = (least is None or value >= least) and (most is None or value <= most)
    return {"name": name, "value": value, "least": least, "most": most, "met": met}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
