"""Arrays in a temporary file that is mapped: they take room on the disk, not private memory."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

_PIECE = 1 << 20


def mapped_array(
    shape: tuple[int, ...], dtype: DTypeLike = np.float32, folder: Path | None = None
) -> NDArray[np.floating]:
    """Zeros in a file without a name, which is gone with the array.

    Args:
        folder: on the disk that has room; None for the system's temporary one.

    Raises:
        OSError: the folder does not exist, or its disk is full.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not n_bytes:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        # A hole would end the process with SIGBUS where the disk is full; writing says so.
        zeros = bytes(min(n_bytes, _PIECE))
        for start in range(0, n_bytes, _PIECE):
            file.write(zeros[: n_bytes - start])
        file.flush()
        return np.memmap(file, dtype, "r+", shape=shape)
