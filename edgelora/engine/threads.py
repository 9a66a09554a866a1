"""How many threads llama.cpp is given: what a self-test found for this CPU, or one a core."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeGuard

import psutil

from edgelora.embedding_cache import cache_folder
from edgelora.engine import native
from edgelora.files import write_atomic

_FILE = "threads.json"


@dataclass(frozen=True)
class Threads:
    """Threads for prompts (many tokens at once) and for answers (one token after the other)."""

    prompt: int
    decode: int


def default_threads() -> int:
    """One for each physical core."""
    return psutil.cpu_count(logical=False) or 1


def stored_threads(architecture: str) -> Threads | None:
    """What `store_threads` kept for this CPU, this llama.cpp and bases of an architecture.

    None where nothing is kept, or what is there cannot be meant for this machine.
    """
    found = _read().get(_key(architecture))
    prompt, decode = (
        (found.get("prompt"), found.get("decode")) if isinstance(found, dict) else (None, None)
    )
    return Threads(prompt, decode) if _is_count(prompt) and _is_count(decode) else None


def store_threads(architecture: str, threads: Threads) -> Path:
    """Keep a choice in the cache folder; returns the file."""
    path = cache_folder() / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _read() | {_key(architecture): asdict(threads)}
    write_atomic(path, json.dumps(entries, indent=1, sort_keys=True).encode())
    return path


@functools.cache
def cpu_model() -> str:
    """The name that the CPU gives itself, or what Python knows of it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "linux":
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        elif sys.platform == "darwin":
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                asked, capture_output=True, text=True, check=True, timeout=5
            ).stdout.strip()
    return platform.processor() or platform.machine()


def _is_count(n: object) -> TypeGuard[int]:
    return type(n) is int and 1 <= n <= (psutil.cpu_count() or 1)


def _key(architecture: str) -> str:
    """A virtual machine may be given more cores of the same CPU: then it is another machine."""
    cores = f"{default_threads()} cores, {psutil.cpu_count()} threads"
    return f"{cpu_model()}, {cores}, llama-cpp-python {native.version()}, {architecture}"


def _read() -> dict[str, object]:
    """A file that is damaged counts as absent: it is only a cache."""
    try:
        entries = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}
