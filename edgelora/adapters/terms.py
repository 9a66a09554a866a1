"""What the combination of one tensor adds up, read from the sources when it is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.lora import LoraPair, for_components, stacked
from edgelora.adapters.lora_layout import PairPlan
from edgelora.adapters.lowrank import Factors, Float32, dense_norm, product_norm
from edgelora.errors import InvalidFile

CHUNK_RANK = 512
# Of the matrix's own rank: above this share of it, working on the dense sum is cheaper.
DENSE_SHARE = 0.5
# float32 factors: an update this small beside its factors is what cancelling left over.
CANCELLED = 1e-6


class Source(Protocol):
    """An adapter that can be combined; gguf_lora.LoraFile is one."""

    @property
    def plan(self) -> Mapping[str, PairPlan]:
        """Names and sizes of its updates."""

    def pair(self, name: str) -> LoraPair:
        """One update."""


@dataclass(frozen=True)
class Terms:
    """The terms `scale * B_i @ diag(s_i c_i) @ A_i` of one tensor, those without weight left out.

    Attributes:
        coefficients: the c_i, (r_i,) float64 each.
        shape: (out, in); (0, 0) without any term.
    """

    name: str
    sources: tuple[Source, ...]
    coefficients: tuple[NDArray[np.float64], ...]
    scale: float
    shape: tuple[int, int]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each term."""
        return tuple(source.plan[self.name].rank for source in self.sources)

    @property
    def stacked_rank(self) -> int:
        """R, the sum of the ranks."""
        return sum(self.ranks)

    @property
    def is_dense(self) -> bool:
        """Whether the stacked factors hold so much that the sum itself is better worked on."""
        return self.stacked_rank > DENSE_SHARE * min(self.shape)

    def pairs(self) -> Iterator[tuple[LoraPair, NDArray[np.float64]]]:
        """Each update, with what its components are multiplied by beyond the update's own scale."""
        for source, coefficients in zip(self.sources, self.coefficients, strict=True):
            yield source.pair(self.name), self.scale * coefficients

    def stack(self) -> Factors:
        """All terms as one pair: every A_i below the other, every scaled B_i beside the other.

        Returns:
            (R, in) and (out, R) float32.
        """
        return _stack(list(self.pairs()))

    def dense(self) -> tuple[Float32, float]:
        """The sum itself, and its norm as `norm` has it.

        The factors are read a few hundred ranks at a time, so memory is that of the sum.

        Returns:
            (out, in) float32, and a Frobenius norm.

        Raises:
            InvalidFile: the norm is not a number.
        """
        from scipy.linalg.blas import sgemm

        total = np.zeros(self.shape, np.float32)
        squares_a = squares_b = 0.0
        for chunk in self._chunks():
            lora_a, lora_b = _stack(chunk)
            squares_a += _norm(lora_a) ** 2
            squares_b += _norm(lora_b) ** 2
            # BLAS counts columns first: the transposes are the arrays as they lie, without a copy.
            sgemm(1.0, lora_a.T, lora_b.T, beta=1.0, c=total.T, overwrite_c=True)
        bound = math.sqrt(squares_a) * math.sqrt(squares_b)
        self._refuse_nonfinite(bound)
        return total, self.real_norm(dense_norm(total), bound)

    def norm(self) -> float:
        """The Frobenius norm of the sum; 0 where it is only what cancelling left over."""
        if self.is_dense:
            return self.dense()[1]
        return self.norm_of(self.stack())

    def norm_of(self, factors: Factors) -> float:
        """The same, of the stacked factors."""
        return self.real_norm(product_norm(factors[1], factors[0]), self.bound(factors))

    def bound(self, factors: Factors) -> float:
        """|A| |B|, which the norm of the sum cannot exceed.

        Raises:
            InvalidFile: it is not a number.
        """
        bound = math.prod(_norm(factor) for factor in factors)
        self._refuse_nonfinite(bound)
        return bound

    def real_norm(self, norm: float, bound: float) -> float:
        """The norm, or 0 where it is rounding beside the norms of the factors.

        Raises:
            InvalidFile: it is not a number.
        """
        self._refuse_nonfinite(norm)
        return norm if norm > CANCELLED * bound else 0.0

    def _refuse_nonfinite(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise InvalidFile(
                f"{self.name}: an adapter holds NaN or infinite values, or some too large to square"
            )

    def _chunks(self) -> Iterator[list[tuple[LoraPair, NDArray[np.float64]]]]:
        chunk: list[tuple[LoraPair, NDArray[np.float64]]] = []
        for pair, weight in self.pairs():
            if chunk and sum(p.rank for p, _ in chunk) + pair.rank > CHUNK_RANK:
                yield chunk
                chunk = []
            chunk.append((pair, weight))
        yield chunk


def terms_of(
    name: str, sources: Sequence[Source], weights: NDArray[np.float64], scale: float
) -> Terms:
    """The terms of one tensor.

    Args:
        weights: one for each source, (k,), or one for each of its components, (k, r), padded.
    """
    used = [
        (source, for_components(weight, source.plan[name].rank))
        for source, weight in zip(sources, weights, strict=True)
        if (weight * scale).any() and name in source.plan
    ]
    planned = used[0][0].plan[name] if used else None
    return Terms(
        name,
        tuple(source for source, _ in used),
        tuple(coefficients for _, coefficients in used),
        scale,
        (planned.n_out, planned.n_in) if planned else (0, 0),
    )


def _stack(terms: Sequence[tuple[LoraPair, NDArray[np.float64]]]) -> Factors:
    factors = [weight * pair.scale for pair, weight in terms]
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused by the norm
        lora_a, lora_b = stacked([pair for pair, _ in terms])
        lora_b *= np.concatenate(factors).astype(np.float32)
    return lora_a, lora_b


def _norm(factor: Float32) -> float:
    """Infinite where a square is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.linalg.norm(factor))
