"""What a backward pass leaves behind: gradients of coefficients, or of the factors of an adapter.

An observer is called with the name of a matrix W, its input x (t, in) and the gradient g (t, out)
at its output, for every matrix that a pass goes back through; it adds up over calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.adapters.lora import LoraPair
from edgelora.gradient.layers import low_rank_factors, low_rank_slopes
from edgelora.gradient.stacks import Stacks
from edgelora.gradient.weights import Array, Buffer

Observer = Callable[[str, Array, Array], None]

# Rows of stacked factors that are in float at a time: 16 MB each at an embedding of 4,096.
STACKED_RANK = 1024


class CoefficientGradients:
    """dL/dc of every rank-one component of a bank in every tensor: c_ir multiplies s_i b_ir a_ir.

    `dL/dc_ir = s_i sum_t (g B_i)_tr (x A_i^T)_tr`: the update is linear, so this does not depend on
    the coefficients at which the pass was run, except through x and g.

    Attributes:
        names: the n_tensors tensors that any adapter updates.
        components: (k, n_tensors, largest rank) float64; 0 beyond an adapter's rank, and where it
            does not update a tensor.
    """

    def __init__(
        self,
        adapters: Sequence[LoraFile],
        stacked_rank: int = STACKED_RANK,
        stacks: Stacks | None = None,
    ) -> None:
        """Stacks: of these adapters, where they are kept from one pass to the next."""
        self._stacks = stacks or Stacks(adapters)
        self.names = tuple(self._stacks.members)
        rank = max((p.rank for adapter in adapters for p in adapter.plan.values()), default=0)
        self.components = np.zeros((len(adapters), len(self.names), rank))
        self._adapters = adapters
        self._columns = {name: column for column, name in enumerate(self.names)}
        self._stacked_rank = stacked_rank
        self._room = Buffer(), Buffer()

    @property
    def values(self) -> NDArray[np.float64]:
        """The same of whole adapters, where c_i multiplies s_i B_i A_i: (k, n_tensors)."""
        return np.asarray(self.components.sum(axis=2))

    def __call__(self, name: str, x: Array, g: Array) -> None:
        """Add the gradients of one matrix."""
        if name not in self._columns:
            return
        for group in self._groups(name):
            stack = self._stacks.of(name, group, x.dtype, self._room)
            slopes = stack.scales * low_rank_slopes(g, x, stack.lora_a, stack.lora_b)
            self.components[stack.owners, self._columns[name], stack.within] += slopes

    def _groups(self, name: str) -> Iterator[list[int]]:
        """Adapters that update a tensor, as many at a time as may be stacked."""
        group: list[int] = []
        rank = 0
        for index in self._stacks.members[name]:
            own = self._adapters[index].rank(name)
            if group and rank + own > self._stacked_rank:
                yield group
                group, rank = [], 0
            group.append(index)
            rank += own
        if group:
            yield group


class FactorGradients:
    """dL/dA and dL/dB of the pairs of one adapter.

    Attributes:
        values: tensor name -> (d_a (r, in), d_b (out, r)).
    """

    def __init__(self, pairs: Mapping[str, LoraPair]) -> None:
        self.values: dict[str, tuple[Array, Array]] = {}
        self._pairs = pairs

    def __call__(self, name: str, x: Array, g: Array) -> None:
        """Add the gradients of one matrix."""
        pair = self._pairs.get(name)
        if pair is None:
            return
        lora_a, lora_b = np.asarray(pair.lora_a, x.dtype), np.asarray(pair.lora_b, x.dtype)
        d_a, d_b = low_rank_factors(g, x, lora_a, lora_b, pair.scale)
        before = self.values.get(name)
        self.values[name] = (before[0] + d_a, before[1] + d_b) if before else (d_a, d_b)


def per_adapter(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The gradients of one weight for each whole adapter, (k,)."""
    return np.asarray(values.sum(axis=1))


def per_layer(values: NDArray[np.float64], names: Sequence[str]) -> NDArray[np.float64]:
    """The gradients of one weight for each adapter in each layer, (k, n_layers).

    Layers without any tensor are left out; tensors outside the blocks are one more, the last.
    """
    matches = [re.match(r"blk\.(\d+)\.", name) for name in names]
    layers = np.array([float(match[1]) if match else np.inf for match in matches])
    return np.asarray(values @ (layers[:, None] == np.unique(layers)))
