"""What is added to the base's matrices in a pass: one adapter, or a combination of many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from edgelora.adapters.architectures import EMBEDDING
from edgelora.adapters.base import Base
from edgelora.adapters.gguf_lora import LoraFile, check
from edgelora.adapters.lora import LoraPair
from edgelora.errors import IncompatibleAdapter, UnsupportedFile
from edgelora.gradient.stacks import Stacks

Updates = Mapping[str, LoraPair]


class Combined(Mapping[str, LoraPair]):
    """`sum_i s_i B_i diag(c_i) A_i`, coefficients for each tensor; stacked when asked for.

    A tensor whose coefficients are all zero is not in it.
    """

    def __init__(
        self,
        adapters: Sequence[LoraFile],
        coefficients: Mapping[str, ArrayLike],
        dtype: type[np.floating[Any]] = np.float32,
        stacks: Stacks | None = None,
    ) -> None:
        """Coefficients: for each tensor's name, one for each adapter, (k,), or each component.

        The latter are (k, r), padded to the largest rank.

        Args:
            stacks: of these adapters, where they are kept from one combination to the next.
        """
        self.adapters = adapters
        self._stacks = stacks or Stacks(adapters)
        self.coefficients = {name: np.asarray(row, float) for name, row in coefficients.items()}
        self._dtype = dtype
        self._used = {
            name: used
            for name, row in self.coefficients.items()
            if (used := [i for i, c in enumerate(row) if c.any() and name in adapters[i].plan])
        }

    def __getitem__(self, name: str) -> LoraPair:
        row, stack = self.coefficients[name], self._stacks.of(name, self._used[name], self._dtype)
        values = row[stack.owners] if row.ndim == 1 else row[stack.owners, stack.within]
        lora_b = stack.lora_b * (values * stack.scales).astype(self._dtype)
        return LoraPair(name, stack.lora_a, lora_b, 1.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._used)

    def __len__(self) -> int:
        return len(self._used)


def of_adapter(adapter: LoraFile) -> Updates:
    """One adapter as it is; factors stay memory-mapped."""
    return {pair.name: pair for pair in adapter.pairs()}


def refuse_misfits(adapters: Sequence[LoraFile], base: Base) -> None:
    """Check that gradients of these adapters exist on this base.

    Raises:
        IncompatibleAdapter: names, shapes or identity differ.
        UnsupportedFile: an adapter of the input embedding, whose input is no row of activations.
    """
    for adapter in adapters:
        problems = check(adapter, base)
        if problems:
            raise IncompatibleAdapter(
                f"{adapter.path}: does not fit {base.path.name}", problems=problems[:20]
            )
        if EMBEDDING in adapter.plan:
            raise UnsupportedFile(
                f"{adapter.path}: adapts {EMBEDDING}, whose gradient is not computed here"
            )
