"""The best rank r of a dense matrix by block Krylov subspaces, with a bound on what it misses.

Where the stacked rank of a combination nears the matrix's own, no small core is left to work on,
and a full SVD takes minutes. The leading singular vectors alone take about a second: a basis of
Y, GY, GGY, ... with G = M M' and Y = M times a random block (Golub and Kahan, 1965; Musco and
Musco, 2015, arXiv:1504.05477, algorithm 2) grows until what it misses is bounded. The same matrix
gives the same bytes on one BLAS thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgelora.adapters.lowrank import (
    AUTO_CAP,
    ROUNDING,
    Factors,
    Float32,
    Float64,
    product_distance,
    rank_for,
    reduced,
)

# The squares of all singular values cost little for matrices up to SMALL, or where a good share of
# them is wanted anyway.
SMALL, EXACT_SHARE = 1024, 1 / 32
EXTRA = 16
FIRST_CHECK, CHECK_EVERY = 6, 3
# What the optimum may be better by: shares of the squared error, and of the squared norm.
TOLERANCE, FLOOR = 1e-5, 1e-10


@dataclass(frozen=True)
class Best:
    """An approximation of a dense matrix.

    Attributes:
        factors: (r, in) and (out, r) float32, balanced.
        error: Frobenius norm of (their product - the matrix), measured.
        excess: a bound on how much of it the best approximation of rank r would save.
    """

    factors: Factors
    error: float
    excess: float


@dataclass(frozen=True)
class _Ritz:
    """What a basis tells of G: values (k,) descending, vectors (l, k), norms of residuals (k,)."""

    values: Float64
    vectors: Float64
    residuals: Float64

    def missed(self, rank: int) -> float:
        """A bound on how much more energy the best `rank` directions hold than these.

        G is [[T, C'], [C, H]] with T the values kept, C the residuals, and H of a norm m that the
        next value tells. Ky Fan's sum of the largest eigenvalues exceeds that of T by no more than
        the nuclear norm of C; and, since [[W, -C'], [-C, C W^-1 C']] is positive for any W, by no
        more than r |C|^2 / (t_r - m). A direction orthogonal to the random block would be missed.
        """
        residuals = self.residuals[:rank]
        linear = float(residuals.sum())
        if len(self.values) == rank:
            return linear
        gap = float(self.values[rank - 1] - self.values[rank] - self.residuals[rank])
        return min(linear, rank * float((residuals**2).sum()) / gap) if gap > 0 else linear


class _Basis:
    """Orthonormal rows of a Krylov space, and what the matrix makes of them.

    Args:
        matrix: M (n, m) float32.
        width: of the first block; later ones are narrower where nothing new is left to find.
    """

    def __init__(self, matrix: Float32, width: int) -> None:
        self.matrix = matrix
        self.size = self.n_blocks = 0
        self._rows = np.zeros((0, len(matrix)), np.float32)
        self._core = np.zeros((0, 0))  # rows @ G @ rows.T: block tridiagonal, the lower half
        start = np.random.default_rng(0).standard_normal((width, matrix.shape[1]), dtype=np.float32)
        self._next, _ = _orthonormal(start @ matrix.T, self._rows)
        self._coupling = np.zeros((len(self._next), 0))

    @property
    def is_whole(self) -> bool:
        """Whether the space holds all that the matrix reaches from the first block."""
        return not len(self._next)

    def grow(self) -> None:
        """One more block."""
        before, old, new = self._coupling.shape[1], self.size, self.size + len(self._next)
        self._reserve(new)
        self._rows[old:new] = self._next
        image: Float32 = self._next @ self.matrix
        exact = image.astype(np.float64)
        self._core[old:new, old - before : old] = self._coupling
        self._core[old:new, old:new] = exact @ exact.T
        self.size, self.n_blocks = new, self.n_blocks + 1
        self._next, self._coupling = _orthonormal(image @ self.matrix.T, self._rows[:new])

    def ritz(self, count: int) -> _Ritz:
        """The `count` largest, or all."""
        from scipy.linalg import eigh

        span = [max(0, self.size - count), self.size - 1]
        core = self._core[: self.size, : self.size]
        values, vectors = eigh(core, subset_by_index=span, check_finite=False)
        values, vectors = values[::-1], vectors[:, ::-1]
        last = vectors[self.size - self._coupling.shape[1] :]
        residuals = np.linalg.norm(self._coupling @ last, axis=0)
        return _Ritz(np.maximum(values, 0.0), vectors, residuals)

    def lift(self, vectors: Float64) -> Float32:
        """Ritz vectors in the matrix's own space, (n, k)."""
        lifted: Float32 = self._rows[: self.size].T @ vectors.astype(np.float32)
        return lifted

    def _reserve(self, size: int) -> None:
        if size > len(self._rows):
            room = min(len(self.matrix), max(2 * len(self._rows), FIRST_CHECK * size))
            rows = np.zeros((room, len(self.matrix)), np.float32)
            core = np.zeros((room, room))
            rows[: self.size] = self._rows[: self.size]
            core[: self.size, : self.size] = self._core[: self.size, : self.size]
            self._rows, self._core = rows, core


def best_of_dense(matrix: Float32, norm: float, rank: int | None) -> Best:
    """The best approximation of rank `rank`, or of the rank that lowrank.rank_for chooses.

    Args:
        matrix: (out, in) float32; norm: its Frobenius norm, above 0.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wanted = min(rank or AUTO_CAP, len(wide))
    is_exact = len(wide) <= SMALL or wanted > EXACT_SHARE * len(wide)
    left, kept, missed = (_exact if is_exact else _leading)(wide, norm, rank, wanted)
    right = left.T @ wide
    lora_a, lora_b = reduced(left, right, kept).factors
    factors = (lora_a, lora_b) if wide is matrix else (lora_b.T, lora_a.T)
    error = product_distance(matrix, factors)
    return Best(factors, error, error - math.sqrt(max(0.0, error**2 - missed)))


def _exact(wide: Float32, norm: float, rank: int | None, wanted: int) -> tuple[Float32, int, float]:
    """The same by all of G in float64, which misses nothing."""
    from scipy.linalg import eigh

    n = len(wide)
    gram = np.zeros((n, n))
    for at in range(0, wide.shape[1], n):
        tile = wide[:, at : at + n].astype(np.float64)
        gram += tile @ tile.T
    span = [n - wanted, n - 1]
    values, vectors = eigh(gram, subset_by_index=span, overwrite_a=True, check_finite=False)
    kept = rank_for(np.sqrt(np.maximum(values[::-1], 0.0)), rank, norm)
    return vectors[:, ::-1].astype(np.float32), kept, 0.0


def _leading(
    wide: Float32, norm: float, rank: int | None, wanted: int
) -> tuple[Float32, int, float]:
    """Vectors (n, k) whose span holds the best r directions, r, and the energy that these miss."""
    basis = _Basis(wide, wanted + EXTRA)
    while True:
        basis.grow()
        early = basis.n_blocks < FIRST_CHECK or basis.n_blocks % CHECK_EVERY
        if early and not basis.is_whole:
            continue
        ritz = basis.ritz(wanted + EXTRA)
        kept = rank_for(np.sqrt(ritz.values), rank, norm)
        missed = ritz.missed(kept)
        lost = norm**2 - float(ritz.values[:kept].sum())
        if basis.is_whole or missed <= max(TOLERANCE * lost, FLOOR * norm**2):
            return basis.lift(ritz.vectors), kept, missed


def _orthonormal(rows: Float32, against: Float32) -> tuple[Float32, Float64]:
    """An orthonormal basis Q of what rows hold beyond `against`, and C with rows = C' @ Q + ...

    Each pass projects and gives the remainder its length again, for what is left of a small one is
    not orthogonal yet. Directions that lose their length a second time are rounding: dropped.
    """
    from scipy.linalg import qr

    lengths = np.linalg.norm(rows, axis=1)
    q = np.divide(rows, lengths[:, None], out=np.zeros_like(rows), where=lengths[:, None] > 0)
    coupling, least = np.diag(lengths.astype(np.float64)), ROUNDING
    while True:
        full, r = qr((q - (q @ against.T) @ against).T, mode="economic", check_finite=False)
        kept = np.flatnonzero(np.abs(np.diagonal(r)) > least)
        q, coupling = np.ascontiguousarray(full.T[kept]), r[kept].astype(np.float64) @ coupling
        if least > ROUNDING and len(kept) == r.shape[1]:
            return q, coupling
        least = 0.5
