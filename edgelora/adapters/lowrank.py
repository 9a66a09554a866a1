"""Maths of products `lora_b @ lora_a` that never form them: norm, singular values, best rank r.

QR of both factors and an SVD of the small core give the same optimum as a full SVD of the matrix
(Eckart-Young); the factors stay float32, the core is float64. Where the stacked rank exceeds the
matrix's own, the core is as large as the matrix and the cost is that of a dense SVD.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Factors = tuple[Float32, Float32]

AUTO_ENERGY = 0.99
AUTO_CAP = 64
# Singular values this small beside the largest are rounding of the float32 factors.
ROUNDING = 2e-6


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
    from scipy.linalg import qr

    q_b, r_b = qr(lora_b, mode="economic", check_finite=False)
    q_a, r_a = qr(lora_a.T, mode="economic", check_finite=False)
    u, s, vt = np.linalg.svd(_core(r_b, r_a), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(rank)])
    root = np.sqrt(s) * signs
    new_b = q_b @ (u * root).astype(np.float32)
    new_a = (vt * root[:, None]).astype(np.float32) @ q_a.T
    return new_a, new_b


def singular_values(lora_b: Float32, lora_a: Float32) -> Float64:
    """The singular values of `lora_b @ lora_a`, largest first, without forming the product."""
    from scipy.linalg import qr

    n_b, n_a = min(lora_b.shape), min(lora_a.shape)
    (r_b,) = qr(lora_b, mode="r", check_finite=False)
    (r_a,) = qr(lora_a.T, mode="r", check_finite=False)
    values = np.linalg.svd(_core(r_b[:n_b], r_a[:n_a]), compute_uv=False)
    return np.asarray(values, dtype=np.float64)


def rank_for(values: Float64, rank: int | None) -> int:
    """How many singular values to keep: `rank`, or 99 % of the energy; never those of rounding."""
    n_real = int((values > ROUNDING * values[0]).sum())
    if rank is None:
        energy = np.cumsum(values**2)
        rank = min(int(np.searchsorted(energy, AUTO_ENERGY * energy[-1])) + 1, AUTO_CAP)
    return min(rank, n_real)


def product_norm(lora_b: Float32, lora_a: Float32) -> float:
    """The Frobenius norm of `lora_b @ lora_a` through the two small Gram matrices in float64.

    NaN where a factor holds NaN or infinity.
    """
    b, a = lora_b.astype(np.float64), lora_a.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(((b.T @ b) * (a @ a.T)).sum())
    # Not max(0.0, square), which is 0 where square is NaN.
    return 0.0 if square < 0 else math.sqrt(square)


def _core(r_b: Float32, r_a: Float32) -> Float64:
    core: Float64 = r_b.astype(np.float64) @ r_a.astype(np.float64).T
    return core
