"""Memory of this machine and of a process: what is free, and what mapped files do not inflate."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

INTERVAL_S = 0.05
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGE_BYTES = 256 << 10
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# Of version 2 and of version 1, by the controller: folder, limit, usage, and how lines of
# memory.stat begin.
_CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


@dataclass(frozen=True)
class Usage:
    """Memory of a process, as this system tells it.

    Attributes:
        kind: "anonymous" (RssAnon of Linux); "private" (Windows, swapped out or not); "unique"
            (the pages of no other process: macOS); or "resident", where mapped files count too.
    """

    size_bytes: int
    kind: str

    def __str__(self) -> str:
        note = ", mapped files included" if self.kind == "resident" else ""
        return f"{self.size_bytes / 1e6:,.0f} MB ({self.kind}{note})"


def memory_in_use(pid: int | None = None) -> Usage:
    """What a process (by default this one) takes now, mapped files left out where that is known.

    Raises:
        psutil.Error: there is no such process, or it may not be asked.
    """
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return Usage(int(line.split()[1]) << 10, "anonymous")
    return usage_by_psutil(psutil.Process(pid))


def usage_by_psutil(process: psutil.Process) -> Usage:
    """The same for a system without RssAnon.

    Raises:
        psutil.Error: as `memory_in_use`.
    """
    memory = process.memory_info()
    if hasattr(memory, "private"):
        return Usage(int(memory.private), "private")
    with contextlib.suppress(AttributeError, psutil.AccessDenied):  # not on every system
        return Usage(int(process.memory_full_info().uss), "unique")
    return Usage(int(memory.rss), "resident")


class PeakMemory:
    """The most that this process took, among samples and the moments of asking."""

    def __init__(self) -> None:
        self._peak = memory_in_use()

    def read(self) -> Usage:
        """Take one sample more; the largest of all."""
        now = memory_in_use()
        if now.size_bytes > self._peak.size_bytes:
            self._peak = now
        return self._peak


@contextlib.contextmanager
def sampled_peak(interval_s: float = INTERVAL_S) -> Iterator[PeakMemory]:
    """Sample the memory of this process in a thread while the block runs."""
    peak, ended = PeakMemory(), threading.Event()

    def sample() -> None:
        while not ended.wait(interval_s):
            peak.read()

    thread = threading.Thread(target=sample, name="edgelora-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def return_large_blocks() -> bool:
    """Have freed blocks of 256 KB and more go back to the system at once; False without glibc.

    By itself glibc raises that bound to the largest block ever freed, 32 MB at most, and holes stay
    with the process: a server grew by a tenth over 2,000 answers, a build at 7B held 350 MB.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS; Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE_BYTES) and mallopt(_TRIM_THRESHOLD, _LARGE_BYTES))


def available_bytes() -> int:
    """Memory that is free or can be freed, within the limits of this process's cgroups if any."""
    of_machine: int = psutil.virtual_memory().available
    return max(0, min([of_machine, *(free for _, free in _cgroups())]))


def limit_bytes() -> int:
    """The memory of this machine, or the least limit of this process's cgroups."""
    of_machine: int = psutil.virtual_memory().total
    return min([of_machine, *(limit for limit, _ in _cgroups())])


def _cgroups() -> Iterator[tuple[int, int]]:
    """Limit and free bytes of each cgroup of this process that has a limit, up to the root."""
    own = {"": "/", "memory": "/"}
    with contextlib.suppress(OSError, ValueError):  # another system, or lines not known here
        for line in _OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            own.update({name: path for name in controllers.split(",") if name in own})
    for controller, (folder, limit, used, total) in _CGROUP_FILES.items():
        inside = PurePosixPath(own[controller])
        # A container may be told the host's path, which is not there: the root is its own.
        for at in (inside, *inside.parents):
            group = _CGROUP / folder / str(at).lstrip("/")
            with contextlib.suppress(OSError, ValueError):  # no such version; "max" is no limit
                most, taken = (int((group / name).read_text()) for name in (limit, used))
                yield most, most - taken + _evictable(group, total)


def _evictable(folder: Path, total: str) -> int:
    """Page cache that counts as used by the cgroup and leaves when memory is wanted.

    Also what is in use of it: a base's mapped weights are, and the machine's free memory has them.
    """
    names = {f"{total}inactive_file", f"{total}active_file"}
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return sum(int(size) for name, size in lines if name in names)
