"""What was tried out on this machine once and holds until its CPU or llama.cpp changes."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgelora.embedding_cache import cache_folder
from edgelora.engine import native
from edgelora.files import write_atomic


@dataclass(frozen=True)
class Findings:
    """A JSON file in the cache folder, of values by what they were found of.

    A virtual machine may be given more cores of the same CPU: then it is another machine.
    """

    file: str

    def read(self, what: str) -> object:
        """What is kept for this machine; None where nothing is."""
        return self._entries().get(_key(what))

    def store(self, what: str, value: object) -> Path:
        """Keep a value; returns the file.

        Raises:
            OSError: the cache folder cannot be written to.
        """
        path = cache_folder() / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = self._entries() | {_key(what): value}
        write_atomic(path, json.dumps(entries, indent=1, sort_keys=True).encode())
        return path

    def found(self) -> dict[str, object]:
        """All that is kept for this machine, by what it was found of."""
        start = _key("")
        return {
            key.removeprefix(start): value
            for key, value in self._entries().items()
            if key.startswith(start)
        }

    def forget(self) -> int:
        """Delete what is kept, of other machines too; returns how many values."""
        n_entries = len(self._entries())
        (cache_folder() / self.file).unlink(missing_ok=True)
        return n_entries

    def _entries(self) -> dict[str, object]:
        """A file that is damaged counts as absent: it is only a cache."""
        try:
            entries = json.loads((cache_folder() / self.file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}


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


def n_cores() -> int:
    """Physical cores; 1 where the system does not tell."""
    return psutil.cpu_count(logical=False) or 1


def _key(what: str) -> str:
    cores = f"{n_cores()} cores, {psutil.cpu_count()} threads"
    return f"{cpu_model()}, {cores}, llama-cpp-python {native.version()}, {what}"
