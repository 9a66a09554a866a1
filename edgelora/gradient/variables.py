"""What a descent varies: coefficients of a bank's adapters, or the factors of one adapter."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.adapters.lora import LoraPair
from edgelora.engine.score import Score, TokenisedExample
from edgelora.errors import EdgeLoRAError
from edgelora.gradient.decoder import Decoder, PassOptions
from edgelora.gradient.observers import CoefficientGradients, FactorGradients
from edgelora.gradient.stacks import Stacks
from edgelora.gradient.updates import Combined, Updates
from edgelora.gradient.weights import Array

WEIGHTS = ("component", "tensor", "layer", "adapter")


class Variables(Protocol):
    """Values in one vector, what they add to the base, and the slope of a loss along each."""

    @property
    def start(self) -> Array:
        """Where a descent begins, (n,)."""

    def updates(self, values: Array) -> Updates:
        """What values (n,) add to the base's matrices."""

    def gradient(
        self,
        decoder: Decoder,
        examples: Sequence[TokenisedExample],
        values: Array,
        options: PassOptions,
    ) -> tuple[Array, list[Score]]:
        """The gradient (n,) of the mean loss over all completion tokens, and each example's."""


class Combination(ABC):
    """Variables that coefficients of a bank's adapters follow from."""

    start: Array

    def __init__(self, adapters: Sequence[LoraFile], stack_bytes: int = 0) -> None:
        """Stack bytes: see PassOptions."""
        self._adapters = adapters
        self._stacks = Stacks(adapters, stack_bytes)

    @abstractmethod
    def by_tensor(self, values: Array) -> dict[str, NDArray[np.float64]]:
        """Coefficients for each tensor's name, as `updates.Combined` takes them."""

    @abstractmethod
    def slopes(self, found: CoefficientGradients) -> Array:
        """The gradient (n,) along the variables from that along the coefficients."""

    def updates(self, values: Array) -> Updates:
        """The combination."""
        return Combined(self._adapters, self.by_tensor(values), stacks=self._stacks)

    def gradient(
        self,
        decoder: Decoder,
        examples: Sequence[TokenisedExample],
        values: Array,
        options: PassOptions,
    ) -> tuple[Array, list[Score]]:
        """See Variables."""
        found = CoefficientGradients(self._adapters, stacks=self._stacks)
        scores = decoder.gradients(examples, self.updates(values), found, options)
        return self.slopes(found), scores


class Coefficients(Combination):
    """One coefficient of each of k adapters for each tensor, each layer, or altogether.

    Attributes:
        names: the tensors that any adapter updates.
        start: (k * groups,) float64.
    """

    def __init__(
        self, adapters: Sequence[LoraFile], start: Array, weights: str, stack_bytes: int = 0
    ) -> None:
        """Start: (k,), the coefficient of each adapter in every tensor.

        Args:
            stack_bytes: see PassOptions.
        """
        super().__init__(adapters, stack_bytes)
        self.names = CoefficientGradients(adapters).names
        self._groups = _groups(self.names, weights)
        n_groups = int(self._groups.max()) + 1
        self.start: Array = np.repeat(np.asarray(start, np.float64), n_groups)

    def by_tensor(self, values: Array) -> dict[str, NDArray[np.float64]]:
        """Coefficients (k,) for each tensor's name."""
        table = values.reshape(len(self._adapters), -1)[:, self._groups]
        return {
            name: np.ascontiguousarray(table[:, column]) for column, name in enumerate(self.names)
        }

    def slopes(self, found: CoefficientGradients) -> Array:
        """The slope of a group's coefficient is the sum of those of its tensors."""
        member = self._groups[:, None] == np.arange(self._groups.max() + 1)
        return np.asarray((found.values @ member).ravel())


class Factors:
    """The entries of lora_a and lora_b of one adapter's pairs, in float32; scales stay.

    Attributes:
        start: (n,) float32.
    """

    def __init__(self, pairs: Mapping[str, LoraPair]) -> None:
        """Pairs by the name of their tensor.

        Raises:
            EdgeLoRAError: there are none.
        """
        if not pairs:
            raise EdgeLoRAError("an adapter without any tensor has nothing to train")
        self._pairs = dict(pairs)
        factors = [f for pair in self._pairs.values() for f in (pair.lora_a, pair.lora_b)]
        self.start: Array = np.concatenate([f.ravel() for f in factors], dtype=np.float32)

    def updates(self, values: Array) -> dict[str, LoraPair]:
        """The pairs with these entries: views of `values`."""
        made, position = {}, 0
        for name, pair in self._pairs.items():
            cut = position + pair.lora_a.size
            end = cut + pair.lora_b.size
            lora_a = values[position:cut].reshape(pair.lora_a.shape)
            lora_b = values[cut:end].reshape(pair.lora_b.shape)
            made[name] = LoraPair(name, lora_a, lora_b, pair.scale)
            position = end
        return made

    def gradient(
        self,
        decoder: Decoder,
        examples: Sequence[TokenisedExample],
        values: Array,
        options: PassOptions,
    ) -> tuple[Array, list[Score]]:
        """In the order of the values."""
        pairs = self.updates(values)
        found = FactorGradients(pairs)
        scores = decoder.gradients(examples, pairs, found, options)
        parts = [part.ravel() for name in pairs for part in found.values[name]]
        return np.concatenate(parts, dtype=np.float32), scores


def _groups(names: Sequence[str], weights: str) -> NDArray[np.int64]:
    """The group of each tensor, numbered from 0 in the order in which they appear."""
    if weights == "tensor":
        return np.arange(len(names))
    if weights == "adapter":
        return np.zeros(len(names), np.int64)
    layers = [found[1] if (found := re.match(r"blk\.(\d+)\.", name)) else "" for name in names]
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
    return np.array([numbers[layer] for layer in layers])
