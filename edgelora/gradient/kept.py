"""The inputs of all blocks of one pass: in memory, or in a temporary file that is mapped."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from edgelora.gradient.weights import Array


class Stack(Protocol):
    """Last in, first out."""

    def append(self, x: Array, /) -> None:
        """Keep one more."""

    def pop(self) -> Array:
        """Give the last one back."""


class _Mapped:
    """Arrays of one shape in a mapped file."""

    def __init__(self, slots: Array) -> None:
        self._slots = slots
        self._n = 0

    def append(self, x: Array, /) -> None:
        self._slots[self._n] = x
        self._n += 1

    def pop(self) -> Array:
        self._n -= 1
        return np.asarray(self._slots[self._n])


@contextlib.contextmanager
def open_stack(scratch: Path | None, n: int, like: Array) -> Iterator[Stack]:
    """A stack for `n` arrays as `like`; with `scratch`, a folder on a disk, they lie in a file.

    The file has no name, or is gone with the end of the block, whatever ends it.

    Raises:
        OSError: the folder does not exist, or its disk is full.
    """
    if scratch is None:
        yield []
        return
    with tempfile.TemporaryFile(dir=scratch) as file:
        # A hole would end the process with SIGBUS where the disk is full; writing says so.
        for _ in range(n):
            file.write(bytes(like.nbytes))
        file.flush()
        yield _Mapped(np.memmap(file, like.dtype, "r+", shape=(n, *like.shape)))
