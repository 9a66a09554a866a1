"""Coefficients of rank-one components, moved along directions that are orthonormal together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.adapters.merge import one_blas_thread
from edgelora.gradient.observers import CoefficientGradients
from edgelora.gradient.stacks import Stack
from edgelora.gradient.variables import Combination
from edgelora.gradient.weights import Array
from edgelora.scratch import mapped_array

Float64 = NDArray[np.float64]

# Of the mean eigenvalue of a Gram matrix: along directions in which components all but cancel each
# other, coefficients would have to be huge.
_RIDGE = 1e-3
# Larger roots lie in a mapped temporary file: at 7B, 64 adapters of rank 16 have 400 MB of them.
_IN_MEMORY_BYTES = 128 << 20


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the R components of one tensor are.

    Attributes:
        values: of the variables.
        owners, within: (R,), the adapter of each and its row there.
        column: of the tensor among the names.
    """

    values: slice
    owners: NDArray[np.int64]
    within: NDArray[np.int64]
    column: int


class Components(Combination):
    """Coordinates u of `sum_m c_m s_m b_m a_m` over the rank-one components m of a tensor.

    The adapters of a bank resemble each other: steps on each c by itself go far along what they
    share, and hardly along what tells them apart. With the Gram matrix of the components,
    `G_mn = s_m s_n (b_m . b_n)(a_m . a_n) = (V L V')_mn`, `c = size V (L + ridge)^(-1/2) u`: a step
    of one length along any u changes the matrix by one Frobenius norm. `size` is that of a typical
    component, so that steps on u are of the size of steps on c. These are the principal directions
    of the bank, and Adam has a step size for each.

    Attributes:
        names: the tensors that any adapter updates.
        start: (n,) float64, n the sum of all ranks of all tensors.
    """

    def __init__(
        self,
        adapters: Sequence[LoraFile],
        start: Array,
        scratch: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        stack_bytes: int = 0,
    ) -> None:
        """Start: (k,), the coefficient of each adapter in every tensor.

        Args:
            scratch: a folder for what does not fit the memory; None for the system's own.
            progress: called with the tensors whose directions are found, and their number.
            stack_bytes: see PassOptions.
        """
        super().__init__(adapters, stack_bytes)
        slopes = CoefficientGradients(adapters)
        self.names = slopes.names
        self._width = slopes.components.shape[2]
        self._places = list(_places(adapters, self.names))
        self._roots = _room([len(place.owners) for place in self._places], scratch)
        self._size = 1.0
        self.start: Array = np.zeros(self._places[-1].values.stop)
        total = 0.0
        with one_blas_thread():  # the same values again when a descent goes on
            for place, root in zip(self._places, self._roots, strict=True):
                name = self.names[place.column]
                gram = _gram(self._stacks.of(name, self._stacks.members[name]))
                total += float(np.trace(gram))
                root[:], inverse = principal_directions(gram)
                self.start[place.values] = inverse @ start[place.owners]
                progress(place.column + 1, len(self.names))
        self._size = float(np.sqrt(total / len(self.start))) or 1.0
        self.start /= self._size

    def by_tensor(self, values: Array) -> dict[str, Float64]:
        """Coefficients (k, largest rank) for each tensor's name, 0 beyond an adapter's rank."""
        made = {}
        for place, root, name in zip(self._places, self._roots, self.names, strict=True):
            table = np.zeros((len(self._adapters), self._width))
            table[place.owners, place.within] = self._size * (root @ values[place.values])
            made[name] = table
        return made

    def slopes(self, found: CoefficientGradients) -> Array:
        """The slope along u is that along c, through the transposed root."""
        slopes = np.empty_like(self.start)
        for place, root in zip(self._places, self._roots, strict=True):
            of_tensor = found.components[place.owners, place.column, place.within]
            slopes[place.values] = self._size * (of_tensor @ root)
        return slopes


def memory_of_directions(adapters: Sequence[LoraFile]) -> int:
    """Bytes that `Components` holds in memory for a bank, beside what lies in a file."""
    n_bytes = 4 * sum(size * size for size in _ranks_by_tensor(adapters).values())
    return n_bytes if n_bytes <= _IN_MEMORY_BYTES else 0


def principal_directions(gram: Float64) -> tuple[Float64, Float64]:
    """V (L + ridge)^(-1/2) and its inverse, for `G = V L V'`; of a zero matrix the unit matrix.

    Args:
        gram: (R, R), symmetric and positive semidefinite.
    """
    values, vectors = np.linalg.eigh(gram)
    ridge = _RIDGE * float(values.mean())
    if ridge <= 0:
        return np.eye(len(gram)), np.eye(len(gram))
    scales = np.sqrt(np.maximum(values, 0) + ridge)
    return vectors / scales, (vectors * scales).T


def _gram(stack: Stack) -> Float64:
    """Frobenius inner products of the components `s b_m a_m`, (R, R)."""
    lora_a, lora_b = stack.lora_a, stack.lora_b
    products = (lora_a @ lora_a.T).astype(np.float64) * (lora_b.T @ lora_b)
    return np.asarray(products * np.outer(stack.scales, stack.scales))


def _ranks_by_tensor(adapters: Sequence[LoraFile]) -> dict[str, int]:
    """The sum of the ranks of all adapters, for each tensor."""
    found: dict[str, int] = {}
    for adapter in adapters:
        for name, rank in adapter.ranks.items():
            found[name] = found.get(name, 0) + rank
    return found


def _places(adapters: Sequence[LoraFile], names: Sequence[str]) -> Iterator[_Place]:
    begin = 0
    for column, name in enumerate(names):
        ranks = [(i, a.rank(name)) for i, a in enumerate(adapters) if name in a.plan]
        owners = np.concatenate([np.full(rank, i) for i, rank in ranks])
        within = np.concatenate([np.arange(rank) for _, rank in ranks])
        yield _Place(slice(begin, begin + len(owners)), owners, within, column)
        begin += len(owners)


def _room(sizes: Sequence[int], scratch: Path | None) -> list[Array]:
    """Float32 matrices (R, R), in memory or, if they are large, in a file without a name.

    Raises:
        OSError: the disk is full.
    """
    n_values = sum(size * size for size in sizes)
    if 4 * n_values <= _IN_MEMORY_BYTES:
        whole: Array = np.zeros(n_values, np.float32)
    else:
        whole = mapped_array((n_values,), folder=scratch)
    ends = np.cumsum([size * size for size in sizes])
    parts = np.split(whole, ends[:-1])
    return [part.reshape(size, size) for part, size in zip(parts, sizes, strict=True)]
