"""The tokens of one decode, in arrays that llama.cpp reads where they are."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EngineError


@dataclass(frozen=True)
class Bounds:
    """What llama.cpp would abort on beyond: ids, positions, sequences and outputs of a batch."""

    n_vocab: int
    n_positions: int
    n_sequences: int
    n_outputs: int


class Batch:
    """At most `n_max` tokens, filled anew for each decode without allocating anything.

    Attributes:
        n_tokens: how many there are.
        n_outputs: how many of them are marked as outputs; their logits come in this order.
        native: the llama_batch.
    """

    def __init__(self, n_max: int) -> None:
        self.n_max = n_max
        self.n_tokens = self.n_outputs = 0
        self._tokens = np.zeros(n_max, np.int32)
        self._positions = np.zeros(n_max, np.int32)
        self._sequences = np.zeros(n_max, np.int32)
        self._outputs = np.zeros(n_max, np.int8)
        self._n_sequences = np.ones(n_max, np.int32)  # each token belongs to one sequence
        start, step = self._sequences.ctypes.data, self._sequences.itemsize
        self._pointers = start + step * np.arange(n_max, dtype=np.uintp)
        int32s = ctypes.POINTER(ctypes.c_int32)
        self.native = llama_cpp.llama_batch(
            token=self._tokens.ctypes.data_as(int32s),
            pos=self._positions.ctypes.data_as(int32s),
            n_seq_id=self._n_sequences.ctypes.data_as(int32s),
            seq_id=self._pointers.ctypes.data_as(ctypes.POINTER(int32s)),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        """Start anew."""
        self.n_tokens = self.n_outputs = 0

    def add(self, token: int, position: int, sequence: int, output: bool) -> None:
        """One more token.

        Raises:
            EngineError: the batch is full.
        """
        i = self.n_tokens
        self._refuse_overfull(i + 1)
        self._tokens[i] = token
        self._positions[i] = position
        self._sequences[i] = sequence
        self._outputs[i] = output
        self.n_tokens = i + 1
        self.n_outputs += output

    def extend(
        self, tokens: Sequence[int] | NDArray[np.int32], position: int, sequence: int, output: bool
    ) -> None:
        """Consecutive tokens of one sequence, the first at `position`, all outputs or none.

        Raises:
            EngineError: the batch is full.
        """
        start, end = self.n_tokens, self.n_tokens + len(tokens)
        self._refuse_overfull(end)
        self._tokens[start:end] = tokens
        self._positions[start:end] = np.arange(position, position + len(tokens))
        self._sequences[start:end] = sequence
        self._outputs[start:end] = output
        self.n_tokens = end
        self.n_outputs += output * len(tokens)

    def is_output(self, index: int) -> bool:
        """Whether token number `index` is an output; -1 is the last output."""
        if index == -1:
            return self.n_outputs > 0
        return 0 <= index < self.n_tokens and bool(self._outputs[index])

    def check(self, bounds: Bounds) -> None:
        """Make it ready for llama.cpp.

        Raises:
            EngineError: something that llama.cpp would abort on.
        """
        n = self.n_tokens
        if n == 0:
            raise EngineError(f"a batch of 0 tokens, 1 to {self.n_max} are possible")
        for what, values, limit in (
            ("token", self._tokens[:n], bounds.n_vocab),
            ("position", self._positions[:n], bounds.n_positions),
            ("sequence", self._sequences[:n], bounds.n_sequences),
        ):
            if values.min() < 0 or values.max() >= limit:
                wrong = values[(values < 0) | (values >= limit)][0]
                raise EngineError(f"{what} {wrong} of {limit}: outside the model or context")
        if self.n_outputs > bounds.n_outputs:
            raise EngineError(f"{self.n_outputs} outputs, {bounds.n_outputs} are possible")
        self.native.n_tokens = n

    def _refuse_overfull(self, n_tokens: int) -> None:
        if n_tokens > self.n_max:
            raise EngineError(f"a batch of {n_tokens} tokens, 1 to {self.n_max} are possible")
