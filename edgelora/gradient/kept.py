"""The inputs of all blocks of one pass: in memory, or in a temporary file that is mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from edgelora.gradient.weights import Array
from edgelora.scratch import mapped_array


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


def make_stack(scratch: Path | None, n: int, like: Array) -> Stack:
    """A stack for `n` arrays as `like`; with `scratch`, a folder on a disk, they lie in a file.

    Raises:
        OSError: the folder does not exist, or its disk is full.
    """
    if scratch is None:
        return []
    return _Mapped(mapped_array((n, *like.shape), like.dtype, scratch))
