"""LoraPair: the low-rank update of one matrix, and the checks that need arrays only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray


@dataclass(frozen=True)
class LoraPair:
    """The update `scale * lora_b @ lora_a` of one base matrix (LoRA, arXiv:2106.09685, eq. 3).

    Attributes:
        name: GGUF name of the base tensor, e.g. `blk.0.attn_q.weight`.
        lora_a: (r, in), float32 or float16, maybe memory-mapped.
        lora_b: (out, r), float32 or float16, maybe memory-mapped.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    name: str
    lora_a: NDArray[np.floating]
    lora_b: NDArray[np.floating]
    scale: float

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return int(self.lora_a.shape[0])


def stacked(
    pairs: Sequence[LoraPair],
    dtype: DTypeLike = np.float32,
    out: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> tuple[Any, Any]:
    """Every A below the other, (R, in), and every B beside the other, (out, R); scales apart.

    Args:
        out: arrays of these shapes to write to, in their own dtype.
    """
    every_a, every_b = [pair.lora_a for pair in pairs], [pair.lora_b for pair in pairs]
    if out is not None:
        return np.concatenate(every_a, out=out[0]), np.concatenate(every_b, axis=1, out=out[1])
    return np.concatenate(every_a, dtype=dtype), np.concatenate(every_b, axis=1, dtype=dtype)


def for_components(coefficient: ArrayLike, rank: int) -> NDArray[np.float64]:
    """What each of the `rank` rank-one components of an update is multiplied by, (rank,).

    Args:
        coefficient: one number for all of them, or one for each; what is beyond the rank is
            padding, so that adapters of several ranks fit one matrix.
    """
    values = np.asarray(coefficient, np.float64)
    return values[:rank] if values.ndim else np.full(rank, values)


def find_mismatches(pair: LoraPair, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every reason why `pair` does not fit a base with these tensor shapes (out, in)."""
    shape = shapes.get(pair.name)
    if shape is None:
        return [f"{pair.name}: the base has no such tensor"]
    problems = []
    if pair.lora_a.ndim != 2 or pair.lora_b.ndim != 2:
        return [f"{pair.name}: lora_a and lora_b must be matrices"]
    if pair.lora_a.shape[0] != pair.lora_b.shape[1]:
        problems.append(
            f"{pair.name}: lora_a has rank {pair.lora_a.shape[0]}, lora_b {pair.lora_b.shape[1]}"
        )
    if (pair.lora_b.shape[0], pair.lora_a.shape[1]) != shape:
        problems.append(
            f"{pair.name}: updates a {pair.lora_b.shape[0]} x {pair.lora_a.shape[1]} matrix, "
            f"the base's is {shape[0]} x {shape[1]}"
        )
    return problems
