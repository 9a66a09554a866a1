"""Factors that wait to be written: in a file without a name, so that memory holds none of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from edgelora.adapters.lowrank import Factors, Float32
from edgelora.files import TEMPORARY_PREFIX


class Spool:
    """A mapping of names to (r, in) and (out, r) float32 factors, in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[str, list[tuple[int, tuple[int, ...]]]] = {}

    def __setitem__(self, name: str, factors: Factors) -> None:
        self._places[name] = [(self._append(array), array.shape) for array in factors]

    def __getitem__(self, name: str) -> Factors:
        lora_a, lora_b = (self._read(*place) for place in self._places[name])
        return lora_a, lora_b

    def _append(self, array: Float32) -> int:
        start = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(array, np.float32).data)
        return start

    def _read(self, start: int, shape: tuple[int, ...]) -> Float32:
        self._file.seek(start)
        data = self._file.read(4 * int(np.prod(shape)))
        return np.frombuffer(data, np.float32).reshape(shape)


@contextlib.contextmanager
def open_spool(folder: Path) -> Iterator[Spool]:
    """A spool on the disk of `folder`; it is gone with the block, whatever ends it.

    Raises:
        OSError: the folder does not exist, or its disk is full.
    """
    with tempfile.TemporaryFile(dir=folder, prefix=TEMPORARY_PREFIX) as file:
        yield Spool(file)
