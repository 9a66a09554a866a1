"""The factors of a bank's adapters stacked tensor by tensor, and kept where they are small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.adapters.lora import stacked
from edgelora.gradient.weights import Array, Buffer

_FLOAT32 = 4


@dataclass(frozen=True, eq=False)
class Stack:
    """The rank-one components `s_m b_m a_m` of some adapters in one tensor, R in all.

    Attributes:
        lora_a, lora_b: (R, in) and (out, R), without scales; not to be written to.
        owners, within: (R,), the adapter of each and its row there.
        scales: (R,) float64.
    """

    lora_a: Array
    lora_b: Array
    owners: NDArray[np.int64]
    within: NDArray[np.int64]
    scales: NDArray[np.float64]


class Stacks:
    """Stacks of a bank's adapters.

    A descent asks for the same ones in every step: in float32 they are kept if all of them fit
    `most_bytes`, else made when asked for.

    Attributes:
        members: the positions of the adapters that update a tensor, by its name.
    """

    def __init__(self, adapters: Sequence[LoraFile], most_bytes: int = 0) -> None:
        self.adapters = adapters
        self.members: dict[str, list[int]] = {}
        for index, adapter in enumerate(adapters):
            for name in adapter.plan:
                self.members.setdefault(name, []).append(index)
        self._is_kept = bytes_of_stacks(adapters) <= most_bytes
        self._kept: dict[str, Stack] = {}

    def of(
        self,
        name: str,
        members: Sequence[int],
        dtype: DTypeLike = np.float32,
        room: tuple[Buffer, Buffer] | None = None,
    ) -> Stack:
        """The stack of a tensor over the adapters at these positions, which all update it.

        Args:
            room: where A and B lie if they are in float32 and not kept.
        """
        is_whole = self._is_kept and dtype == np.float32 and list(members) == self.members[name]
        if is_whole and name in self._kept:
            return self._kept[name]
        made = self._make(name, members, dtype, None if is_whole else room)
        if is_whole:
            self._kept[name] = made
        return made

    def _make(
        self,
        name: str,
        members: Sequence[int],
        dtype: DTypeLike,
        room: tuple[Buffer, Buffer] | None,
    ) -> Stack:
        pairs = [self.adapters[index].pair(name) for index in members]
        ranks = [pair.rank for pair in pairs]
        out = None
        if room is not None and dtype == np.float32:
            n_out, n_in, rank = len(pairs[0].lora_b), pairs[0].lora_a.shape[1], sum(ranks)
            out = room[0].of((rank, n_in)), room[1].of((n_out, rank))
        return Stack(
            *stacked(pairs, dtype, out),
            owners=np.repeat(np.asarray(members, np.int64), ranks),
            within=np.concatenate([np.arange(rank) for rank in ranks]),
            scales=np.repeat([pair.scale for pair in pairs], ranks),
        )


def bytes_of_stacks(adapters: Sequence[LoraFile]) -> int:
    """What all factors take in float32."""
    plans = (planned for adapter in adapters for planned in adapter.plan.values())
    return _FLOAT32 * sum(planned.rank * (planned.n_in + planned.n_out) for planned in plans)
