"""Products with the matrices of a memory-mapped GGUF, of which one tile is in float at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from numpy.typing import NDArray

from edgelora.engine.dequantize import dequantize
from edgelora.gguf_file import GGUFFile
from edgelora.gradient.kernels import Kernels

Array = NDArray[np.floating[Any]]

TILE_WEIGHTS = 4 << 20
_WORTH_THREADS = 1 << 17  # weights: a fifth of a millisecond, several times what a thread costs


class Buffer:
    """Memory for one float32 array after the other.

    Blocks that go back to the system and come anew, full of zeros, take longer than filling them.
    """

    def __init__(self) -> None:
        self._values = np.empty(0, np.float32)

    def of(self, shape: tuple[int, int]) -> NDArray[np.float32]:
        """An array, valid until it is asked again."""
        size = shape[0] * shape[1]
        if self._values.size < size:
            self._values = np.empty(size, np.float32)
        return self._values[:size].reshape(shape)


class Weights:
    """The tensors of a GGUF as operators on rows of activations.

    Attributes:
        dtype: in which everything is computed: float32 to work, float64 to test.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        dtype: type[np.floating[Any]] = np.float32,
        *,
        tile: int = TILE_WEIGHTS,
        n_threads: int = 1,
        kernels: Kernels | None = None,
    ) -> None:
        """Threads: for dequantising; those of the products are BLAS's own.

        Args:
            kernels: of x W^T, where what they round may be rounded; only in float32.
        """
        self.gguf = gguf
        self.dtype = dtype
        self._kernels = kernels if dtype is np.float32 else None
        self._tile = tile
        self._n_threads = n_threads
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix="dequantize")
        self._buffer = Buffer()
        if self._kernels is not None:
            self._choose(self._kernels)

    def __contains__(self, name: str) -> bool:
        return name in self.gguf.tensors

    def vector(self, name: str) -> Array:
        """A norm or a bias, (n,)."""
        return np.asarray(self.gguf.array(name), self.dtype)

    def embed(self, name: str, ids: NDArray[np.integer]) -> Array:
        """The rows `ids` of a matrix, (n, in)."""
        blocks = self._blocks(name)
        raw = np.ascontiguousarray(blocks[ids])
        rows = np.empty((len(ids), self.gguf.tensors[name].shape[1]), np.float32)
        dequantize(raw.reshape(-1), self.gguf.tensors[name].ggml_type, rows.reshape(-1))
        return rows.astype(self.dtype, copy=False)

    def times(self, x: Array, name: str) -> Array:
        """x W^T for W (out, in): x is (t, in), the result (t, out)."""
        info = self.gguf.tensors[name]
        if self._kernels is not None:
            y = self._kernels.times(x, self._rows(name), info.ggml_type)
            if y is not None:
                return y
        y = np.empty((len(x), info.shape[0]), self.dtype)
        for first, tile in self.tiles(name):
            np.matmul(x, tile.T, out=y[:, first : first + len(tile)])
        return y

    def times_back(self, g: Array, name: str) -> Array:
        """g W for W (out, in): g is (t, out), the result (t, in)."""
        info = self.gguf.tensors[name]
        n_out, n_in = info.shape
        block_size = GGML_QUANT_SIZES[info.ggml_type][0]
        dx = np.empty((len(g), n_in), self.dtype)
        # Tiles of whole columns: nothing has to be added up, except where a column is very long.
        for columns in _steps(n_in, self._tile // n_out, block_size):
            width = columns.stop - columns.start
            for rows in _steps(n_out, self._tile // width, 1):
                tile = self._in_float(name, rows, columns)
                if rows.start == 0:
                    np.matmul(g[:, rows], tile, out=dx[:, columns])
                else:
                    dx[:, columns] += g[:, rows] @ tile
        return dx

    def tiles(self, name: str) -> Iterator[tuple[int, Array]]:
        """All rows of a matrix, a tile at a time, each with the number of its first row.

        A tile is valid until the next.
        """
        n_out, n_in = self.gguf.tensors[name].shape
        for rows in _steps(n_out, self._tile // n_in, 1):
            yield rows.start, self._in_float(name, rows, slice(0, n_in))

    def _blocks(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes, (out, blocks of a row, bytes of a block)."""
        info = self.gguf.tensors[name]
        block_size, type_size = GGML_QUANT_SIZES[info.ggml_type]
        n_out, n_in = info.shape
        return self.gguf.raw(name).reshape(n_out, n_in // block_size, type_size)

    def _rows(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes, (out, bytes of a row)."""
        return self._blocks(name).reshape(self.gguf.tensors[name].shape[0], -1)

    def _choose(self, kernels: Kernels) -> None:
        """Have the kernels settle on a way for each type, by the blocks' largest matrix of it."""
        named = ((n, i) for n, i in self.gguf.tensors.items() if n.startswith("blk."))
        matrices = [(math.prod(i.shape), n, i) for n, i in named if len(i.shape) == 2]
        largest = {info.ggml_type: name for _, name, info in sorted(matrices, key=itemgetter(0))}
        for kind, name in largest.items():
            n_in = self.gguf.tensors[name].shape[1]
            in_float = partial(self._in_float, name, columns=slice(0, n_in))
            kernels.choose(self._rows(name), kind, n_in, in_float)

    def _in_float(self, name: str, rows: slice, columns: slice) -> Array:
        """A part of a matrix; in float32 it lies in the one buffer, until the next call."""
        kind = self.gguf.tensors[name].ggml_type
        block_size = GGML_QUANT_SIZES[kind][0]
        blocks = slice(columns.start // block_size, columns.stop // block_size)
        raw = np.ascontiguousarray(self._blocks(name)[rows, blocks])
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        size = shape[0] * shape[1]
        part = self._buffer.of(shape)

        def fill(piece: slice) -> None:
            dequantize(raw[piece].reshape(-1), kind, part[piece].reshape(-1))

        pieces = _steps(shape[0], -(-shape[0] // self._n_threads), 1)
        if len(pieces) == 1 or size < _WORTH_THREADS:
            fill(slice(None))
        else:
            list(self._threads.map(fill, pieces))
        return part.astype(self.dtype, copy=False)


def _steps(total: int, wanted: int, multiple: int) -> list[slice]:
    """0 to `total` in steps of about `wanted`, each a multiple of `multiple`."""
    step = max(wanted // multiple, 1) * multiple
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
