"""Which way x W^T is computed on this CPU: in float32, or by ggml's kernels where they are faster.

Float32 is exact on the dequantised weights. ggml's kernels round rows of x, as llama.cpp does when
it serves the result: see engine/products.py. On the way back there is no choice: blocks of integers
lie along the rows of W, and a gradient is multiplied with its columns.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from edgelora.engine.machine import Findings
from edgelora.engine.products import KINDS, Products

Array = NDArray[np.floating[Any]]
Bytes = NDArray[np.uint8]

logger = logging.getLogger(__name__)

FLOAT32, MAPPED, REPACKED = "float32", "mapped", "repacked"
# What a way has to take less of than the one before it. Other work on the machine delays kernels of
# several threads more than BLAS, so a small gain will do; repacked weights take memory besides.
WORTH = {MAPPED: 0.95, REPACKED: 0.8}
# F32 and F16 weights are as exact as float32 makes them, and rounded rows would not be.
_ROUNDING = KINDS - {GGMLQuantizationType.F32, GGMLQuantizationType.F16}
SMALL = 1 << 17  # weights of a matrix that is not worth a native call
_TRIED_WEIGHTS, _TRIED_ROWS = 4 << 20, 128
_WHOLE = 64  # rows of W: kernels work on as many or a half of it, and are slow on what is left over
_N_ROUNDS, _N_IN_A_ROW = 3, 5
FINDINGS = Findings("products.json")


class Kernels:
    """Products with stored matrices, each type of weights in the way that is fastest here.

    What is fastest is tried out once for each machine and type, half a second each at most, and
    kept in the cache folder, so that the same build makes the same bytes.
    """

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._ways: dict[str, str] = {}

    def choose(
        self, raw: Bytes, kind: GGMLQuantizationType, n_in: int, in_float: Callable[[slice], Array]
    ) -> None:
        """Settle on the way of a type of weights, by one matrix of that type.

        Args:
            raw: (out, bytes of a row) uint8, the stored blocks of W.
            n_in: values of a row.
            in_float: some rows of W in float32.
        """
        if kind.name not in self._ways and self._is_concerned(raw, kind, n_in):
            self._ways[kind.name] = self._find_way(raw, kind, n_in, in_float)

    def times(self, x: Array, raw: Bytes, kind: GGMLQuantizationType) -> Array | None:
        """x W^T, (t, out) float32, for x (t, in) float32; None where float32 is the way."""
        way = self._ways.get(kind.name, FLOAT32)
        if way == FLOAT32 or not self._is_concerned(raw, kind, x.shape[1]):
            return None
        repacked = way == REPACKED and self._products.repacks(raw, kind, x.shape[1])
        return self._products.times(x, raw, kind, repacked=repacked)

    def _is_concerned(self, raw: Bytes, kind: GGMLQuantizationType, n_in: int) -> bool:
        return kind in _ROUNDING and len(raw) * n_in >= SMALL

    @functools.cached_property
    def _products(self) -> Products:
        return Products(self._n_threads)

    def _find_way(
        self, raw: Bytes, kind: GGMLQuantizationType, n_in: int, in_float: Callable[[slice], Array]
    ) -> str:
        what = f"{kind.name}, {self._n_threads} threads"
        kept = FINDINGS.read(what)
        if isinstance(kept, str) and kept in (FLOAT32, MAPPED, REPACKED):
            return kept
        n_rows = max(_TRIED_WEIGHTS // n_in // _WHOLE, 1) * _WHOLE
        seconds = self._try(raw[:n_rows], kind, n_in, in_float)
        found = fastest(seconds)
        logger.debug("products with %s: %s of %s", kind.name, found, seconds)
        try:
            FINDINGS.store(what, found)
        except OSError as error:
            logger.debug("not kept (%s); it will be tried out again", error)
        return found

    def _try(
        self, raw: Bytes, kind: GGMLQuantizationType, n_in: int, in_float: Callable[[slice], Array]
    ) -> dict[str, float]:
        """The shortest time of each way.

        Each is run several times in a row, as passes do: threads of BLAS and of ggml wait for more
        work on their core for a while, at the cost of the other's first product.
        """
        x = np.random.default_rng(0).standard_normal((_TRIED_ROWS, n_in), np.float32)
        times = self._products.times
        ways: dict[str, Callable[[], Array]] = {
            FLOAT32: lambda: x @ in_float(slice(0, len(raw))).T,
            MAPPED: lambda: times(x, raw, kind),
        }
        if self._products.repacks(raw, kind, n_in):
            ways[REPACKED] = lambda: times(x, raw, kind, repacked=True)
        seconds = dict.fromkeys(ways, np.inf)
        for way in [way for way in [*ways] * _N_ROUNDS for _ in range(_N_IN_A_ROW)]:
            started = time.perf_counter()
            ways[way]()
            seconds[way] = min(seconds[way], time.perf_counter() - started)
        return seconds


def fastest(seconds: dict[str, float]) -> str:
    """The way whose gain over the one before it is worth it.

    Example:
        >>> fastest({"float32": 1.0, "mapped": 0.9, "repacked": 0.8})
        'mapped'
    """
    chosen = FLOAT32
    for way, share in WORTH.items():
        if seconds.get(way, np.inf) < share * seconds[chosen]:
            chosen = way
    return chosen
