"""Memory of a process without its mapped files, its peak, and what is free."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgelora import memory
from edgelora.memory import (
    Usage,
    memory_in_use,
    return_large_blocks,
    sampled_peak,
    usage_by_psutil,
)

MB = 1_000_000


@dataclass(frozen=True)
class Numbers:
    """What psutil tells on some system."""

    rss: int = 0
    uss: int = 0
    private: int = 0


@dataclass(frozen=True)
class Resident:
    """What psutil tells where there is nothing better."""

    rss: int


class Process:
    """A process as psutil shows it on another system; `full` None: it may not be asked."""

    def __init__(self, info: object, full: object = None) -> None:
        self.info, self.full = info, full

    def memory_info(self) -> object:
        return self.info

    def memory_full_info(self) -> object:
        if self.full is None:
            raise psutil.AccessDenied
        return self.full


def test_a_mapped_file_does_not_count_and_an_array_does(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(60 * MB))
    before = memory_in_use()
    if before.kind != "anonymous":
        pytest.skip(f"this system tells {before.kind} memory")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        assert memory_in_use().size_bytes - before.size_bytes < 20 * MB
    array = np.ones(60 * MB, np.uint8)
    assert memory_in_use().size_bytes - before.size_bytes > 50 * MB
    assert array[-1] == 1


def test_other_systems_tell_it_in_their_own_way() -> None:
    windows = Process(Numbers(rss=500 * MB, private=40 * MB))
    assert usage_by_psutil(windows) == Usage(40 * MB, "private")
    mac = Process(Resident(500 * MB), Numbers(uss=30 * MB))
    assert usage_by_psutil(mac) == Usage(30 * MB, "unique")
    for other in (Process(Resident(500 * MB), Resident(500 * MB)), Process(Resident(500 * MB))):
        assert usage_by_psutil(other) == Usage(500 * MB, "resident")
    assert str(Usage(1_234_567_890, "resident")) == "1,235 MB (resident, mapped files included)"
    assert str(Usage(40 * MB, "private")) == "40 MB (private)"


def test_a_process_that_does_not_exist_is_psutil_s_error() -> None:
    with pytest.raises(psutil.NoSuchProcess):
        memory_in_use(2**22 + 1)


def test_the_peak_is_seen_although_it_has_passed() -> None:
    before = memory_in_use().size_bytes
    with sampled_peak(interval_s=0.005) as peak:
        array = np.ones(80 * MB, np.uint8)
        time.sleep(0.1)
        del array
        now = memory_in_use().size_bytes
    assert now < before + 40 * MB
    assert peak.read().size_bytes > before + 60 * MB


def test_available_memory_is_within_the_machine() -> None:
    assert 0 < memory.available_bytes() < 1 << 50


@pytest.mark.parametrize(
    ("folder", "limit", "used", "line"),
    [("", "max", "current", ""), ("memory", "limit_in_bytes", "usage_in_bytes", "total_")],
    ids=["version 2", "version 1"],
)  # fmt: skip
def test_the_limit_of_a_cgroup_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, limit: str, used: str, line: str
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    stat = f"anon 5\n{line}inactive_file 9\n{line}active_file 20\nother 100\n"
    files = {limit: "1000000", used: "700000", "stat": stat}
    for name, text in files.items():
        (tmp_path / folder / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == 300_029


@pytest.mark.parametrize(
    ("own", "folder", "limit", "used"),
    [("0::/a b/c\n", "", "max", "current"),
     ("9:name=systemd:/\n4:cpu,memory:/a b/c\n0::/\n", "memory", "limit_in_bytes",
      "usage_in_bytes")],
    ids=["version 2", "version 1"],
)  # fmt: skip
def test_the_narrowest_of_the_cgroups_above_a_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, folder: str, limit: str, used: str
) -> None:
    (tmp_path / "own").write_text(own)
    for path, most in (("a b/c", 9_000_000), ("a b", 1_000_000), ("other", 10)):
        group = tmp_path / folder / path
        group.mkdir(parents=True, exist_ok=True)
        for name, text in {limit: str(most), used: "700000", "stat": "other 5\n"}.items():
            (group / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    assert memory.available_bytes() == 300_000
    assert memory.limit_bytes() == 1_000_000


@pytest.mark.parametrize(
    "own", ["0::/docker/of/the/host\n", "0::/../../elsewhere\n", "a line of another kind\n"]
)
def test_a_process_whose_cgroup_is_not_there_has_the_root_s_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in {"max": "1000000", "current": "700000", "stat": "other 5\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    assert memory.available_bytes() == 300_000


def test_without_cgroups_the_machine_s_memory_is_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "none")
    assert memory.limit_bytes() == psutil.virtual_memory().total


def test_a_cgroup_without_a_limit_leaves_the_machine_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() > 10_000_000


# Large blocks among small ones that stay, after one that makes glibc raise its bound.
HOLES = """
import sys
import numpy as np
from edgelora.memory import return_large_blocks

def anonymous():
    lines = open("/proc/self/status")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

if sys.argv[1] == "at once":
    assert return_large_blocks()
np.ones(30_000_000, np.uint8)
before = anonymous()
small, large = [], []
for _ in range(64):
    large.append(np.ones(1 << 20, np.uint8))
    small.append(np.ones(50_000, np.uint8))
del large
print(anonymous() - before)
"""


def test_freed_blocks_go_back_at_once_or_it_is_said_that_they_do_not() -> None:
    if platform.libc_ver()[0] != "glibc":
        assert not return_large_blocks()
        return
    kept = {
        when: int(subprocess.check_output([sys.executable, "-c", HOLES, when], text=True))
        for when in ("at once", "by itself")
    }
    assert kept["at once"] < 10e6 < 60e6 < kept["by itself"]
