"""What a server gives back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

from edgelora.serve.memory import return_large_blocks

# Large blocks among small ones that stay, after one that makes glibc raise its bound.
HOLES = """
import sys
import numpy as np
from edgelora.serve.memory import return_large_blocks

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
