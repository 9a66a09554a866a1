"""Peak anonymous memory of a command and of its children, which memory-mapping does not inflate.

python scripts/measure_memory.py edgelora demo
"""

from __future__ import annotations

import sys
import time

import psutil

from edgelora.memory import memory_in_use


def main() -> None:
    """Run the command given, then print its time and its peak; ends with its exit code."""
    if len(sys.argv) < 2:
        sys.exit(str(__doc__).strip())
    started = time.monotonic()
    child = psutil.Popen(sys.argv[1:])
    peak = watch(child, interval_s=0.02)
    print(
        f"{time.monotonic() - started:.0f} s, peak anonymous memory {peak / 1e6:.0f} MB",
        file=sys.stderr,
    )
    sys.exit(child.returncode)


def watch(process: psutil.Popen, *, interval_s: float) -> int:
    """Wait for a process; the highest anonymous memory in bytes, its children's added."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(anonymous(p) for p in [process, *_children(process)]))
        time.sleep(interval_s)
    return peak


def anonymous(process: psutil.Process) -> int:
    """Bytes that mapped files do not inflate (edgelora.memory); 0 for a process that has ended."""
    try:
        return memory_in_use(process.pid).size_bytes
    except psutil.Error:
        return 0


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
