"""Maths of products `lora_b @ lora_a` that never form them: norm, singular values, best rank r.

QR of both factors and an SVD of the small core give the same optimum as a full SVD of the matrix
(Eckart-Young); the factors stay float32, the core is float64. Where the stacked rank nears the
matrix's own, the core is as large as the matrix: see `krylov`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

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


def truncated(lora_b: Float32, lora_a: Float32, rank: int) -> Factors:
    """The best rank-r approximation of `lora_b @ lora_a` in the Frobenius norm, balanced.

    Args:
        lora_b: (out, R) float32.
        lora_a: (R, in) float32.
        rank: r, at most min(out, in, R).

    Returns:
        (r, in) and (out, r) float32 factors of equal norm in every component. Signs are fixed: in
        the small core's left vectors the entry of largest magnitude is positive.
    """
    return _cut(*_decompose(lora_b, lora_a), rank)


def decomposed(lora_b: Float32, lora_a: Float32, rank: int | None) -> tuple[Factors, Float64]:
    """The same at the rank that `rank_for` chooses, and all singular values."""
    parts = _decompose(lora_b, lora_a)
    values = parts[2]
    return _cut(*parts, rank_for(values, rank)), values


def _decompose(
    lora_b: Float32, lora_a: Float32
) -> tuple[Float32, Float64, Float64, Float64, Float32]:
    """Q_b, U, s, V', Q_a with lora_b @ lora_a = Q_b U diag(s) V' Q_a'."""
    from scipy.linalg import qr

    q_b, r_b = qr(lora_b, mode="economic", check_finite=False)
    q_a, r_a = qr(lora_a.T, mode="economic", check_finite=False)
    core = r_b.astype(np.float64) @ r_a.astype(np.float64).T
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    return q_b, u, s, vt, q_a


def _cut(q_b: Float32, u: Float64, s: Float64, vt: Float64, q_a: Float32, rank: int) -> Factors:
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(rank)])
    root = np.sqrt(s) * signs
    new_b = q_b @ (u * root).astype(np.float32)
    new_a = (vt * root[:, None]).astype(np.float32) @ q_a.T
    return new_a, new_b


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
    """The Frobenius norm of `lora_b @ lora_a` through the two small Gram matrices in float64."""
    b, a = lora_b.astype(np.float64), lora_a.astype(np.float64)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


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
