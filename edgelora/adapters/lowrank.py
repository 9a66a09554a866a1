"""Maths of products `lora_b @ lora_a` that never form them: norm, singular values, best rank r.

QR of both factors and an SVD of the small core give the same optimum as a full SVD of the matrix
(Eckart-Young); the factors stay float32, the core is float64. Where the stacked rank nears the
matrix's own, the core is as large as the matrix: see `krylov`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Factors = tuple[Float32, Float32]

AUTO_ENERGY = 0.99
AUTO_CAP = 64
# Singular values this small beside the largest are rounding of the float32 factors.
ROUNDING = 2e-6
TILE_ROWS = 256
SMALL_CORE = 128


@dataclass(frozen=True)
class Reduced:
    """A product at a smaller rank.

    Attributes:
        factors: (r, in) and (out, r) float32, of equal norm in every component. Signs are fixed: in
            the small core's left vectors the entry of largest magnitude is positive.
        norm: Frobenius norm of the product; error: of what was cut off.
    """

    factors: Factors
    norm: float
    error: float


def reduced(lora_b: Float32, lora_a: Float32, rank: int | None) -> Reduced:
    """The best approximation of `lora_b @ lora_a` in the Frobenius norm, at a rank of `rank_for`.

    Args:
        lora_b: (out, R) float32.
        lora_a: (R, in) float32.
        rank: a larger one than the product has is cut to that.
    """
    tall_b, tall_a = _Tall(lora_b), _Tall(lora_a.T)
    core = tall_b.r @ tall_a.r.T
    norm = float(np.linalg.norm(core))
    if not norm:
        nothing = np.zeros((0, lora_a.shape[1]), np.float32), np.zeros((len(lora_b), 0), np.float32)
        return Reduced(nothing, 0.0, 0.0)
    u, s, vt = _leading_of(core, rank or AUTO_CAP)
    kept = rank_for(s, rank, norm)
    u, s, vt = u[:, :kept], s[:kept], vt[:kept]
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(kept)])
    root = np.sqrt(s) * signs
    left, right = tall_b.times(u * root), tall_a.times((vt * root[:, None]).T)
    error = math.sqrt(max(0.0, norm**2 - float((s**2).sum())))
    return Reduced((right.T, left), norm, error)


class _Tall:
    """Q and R of a matrix; Q is not formed, since few of its combinations are asked for."""

    def __init__(self, matrix: Float32) -> None:
        from scipy.linalg.lapack import sgeqrf, sgeqrf_lwork

        work, _ = sgeqrf_lwork(*matrix.shape)
        self._packed, self._tau, _, _ = sgeqrf(matrix, lwork=int(work))
        self.r: Float64 = np.triu(self._packed[: len(self._tau)]).astype(np.float64)

    def times(self, coefficients: Float64) -> Float32:
        """Q @ coefficients, (rows, r)."""
        from scipy.linalg.lapack import sormqr

        n_rows, k = len(self._packed), len(self._tau)
        padded = np.zeros((n_rows, coefficients.shape[1]), np.float32, order="F")
        padded[:k] = coefficients
        result: Float32
        packed, lwork = self._packed[:, :k], 64 * max(1, padded.shape[1])
        result, _, _ = sormqr("L", "N", packed, self._tau, padded, lwork, overwrite_c=True)
        return result


def _leading_of(core: Float64, count: int) -> tuple[Float64, Float64, Float64]:
    """The leading singular triplets of a small matrix, or all where they are cheap."""
    from scipy.linalg import eigh

    n = len(core)
    if n <= SMALL_CORE or 4 * count > n:
        u, s, vt = np.linalg.svd(core, full_matrices=False)
        return u, s, vt
    # Squares cost half of the digits of float64, and the factors are float32.
    values, vectors = eigh(core @ core.T, subset_by_index=[n - count, n - 1], check_finite=False)
    u, s = vectors[:, ::-1], np.sqrt(np.maximum(values[::-1], 0.0))
    scale = np.divide(1.0, s, out=np.zeros_like(s), where=s > ROUNDING * s[0])
    return u, s, scale[:, None] * (u.T @ core)


def rank_for(values: Float64, rank: int | None, norm: float | None = None) -> int:
    """How many singular values to keep: `rank`, or 99 % of the energy; never those of rounding.

    Args:
        values: the largest ones, descending; norm: of all, where these are not all.
    """
    n_real = int((values > ROUNDING * values[0]).sum())
    if rank is None:
        energy = np.cumsum(values**2)
        whole = energy[-1] if norm is None else norm**2
        rank = min(int(np.searchsorted(energy, AUTO_ENERGY * whole)) + 1, AUTO_CAP)
    return min(rank, n_real)


def product_norm(lora_b: Float32, lora_a: Float32) -> float:
    """The Frobenius norm of `lora_b @ lora_a` through the two small Gram matrices in float64.

    NaN where a factor holds NaN or infinity.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        gram_b, gram_a = grams(lora_b, lora_a)
        return root_of(float((gram_b * gram_a).sum()))


def grams(lora_b: Float32, lora_a: Float32) -> tuple[Float64, Float64]:
    """lora_b.T @ lora_b and lora_a @ lora_a.T, (R, R) float64: all that norms of products need."""
    b, a = lora_b.astype(np.float64), lora_a.astype(np.float64)
    return b.T @ b, a @ a.T


def root_of(square: float) -> float:
    """The root of a square that rounding may have made negative; NaN stays NaN."""
    return 0.0 if square < 0 else math.sqrt(square)  # max(0.0, square) is 0 where square is NaN


def product_distance(matrix: Float32, factors: Factors) -> float:
    """The Frobenius norm of (lora_b @ lora_a - matrix), a tile of rows at a time."""
    lora_a, lora_b = factors
    return _tiled_norm(
        lora_b[at : at + TILE_ROWS] @ lora_a - matrix[at : at + TILE_ROWS]
        for at in range(0, len(matrix), TILE_ROWS)
    )


def dense_norm(matrix: Float32) -> float:
    """The Frobenius norm of a large float32 matrix, summed in float64."""
    return _tiled_norm(matrix[at : at + TILE_ROWS] for at in range(0, len(matrix), TILE_ROWS))


def _tiled_norm(tiles: Iterable[Float32]) -> float:
    return math.sqrt(math.fsum(float((tile.astype(np.float64) ** 2).sum()) for tile in tiles))
