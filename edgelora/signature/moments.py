"""Embeddings and token ids to a signature: moments, a seeded sample, counts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EdgeLoRAError
from edgelora.signature.record import (
    N_PROJECTED,
    Histogram,
    Signature,
    TextDistribution,
    description_problems,
    projection,
)

N_DIRECTIONS = 4  # covariance directions kept where d permits
N_SAMPLE = 64
FIELD_BYTES = 23_000  # budget of one text field: two of them and the header stay below 48 KB
FULL_PRECISION_D = 1024  # up to this d the mean keeps float32 values, beyond it float16 values
MAX_EMBEDDING = 65_000.0


def summarise(
    prompt_embeddings: NDArray[np.float32],
    completion_embeddings: NDArray[np.float32] | None,
    token_ids: Sequence[Sequence[int]],
    *,
    n_vocab: int,
    base_id: str,
    description: str = "",
    n_layers: int = 0,
    seed: int = 0,
) -> Signature:
    """Summarise one dataset, already embedded and tokenised.

    Args:
        prompt_embeddings: (n, d) float32, n >= 1.
        completion_embeddings: (n', d) float32, or None where there are no completions.
        token_ids: for each example, the ids of prompt and completion.
        n_layers: see Signature.
        seed: draws which texts are in the sample; the projection does not depend on it.

    Raises:
        EdgeLoRAError: embeddings that are empty, not finite, beyond float16's range or of different
            widths; ids outside the vocabulary; a description too long. All problems at once.

    Example:
        >>> s = summarise(np.eye(4, dtype=np.float32), None, [[1, 1, 2]], n_vocab=8, base_id="b")
        >>> s.histogram.ids.tolist(), s.histogram.counts.tolist(), s.n_tokens
        ([1, 2], [2, 1], 3)
    """
    flat = np.fromiter(chain.from_iterable(token_ids), np.int64)
    problems = _input_problems(prompt_embeddings, completion_embeddings, flat, n_vocab, description)
    if problems:
        raise EdgeLoRAError("These texts cannot be summarised", problems=problems)
    ids, counts = np.unique(flat, return_counts=True)
    completion = completion_embeddings
    return Signature(
        prompt=_distribution(prompt_embeddings, seed),
        completion=None if completion is None else _distribution(completion, seed),
        histogram=Histogram(ids.astype(np.int32), counts.astype(np.int32)),
        n_vocab=n_vocab,
        n_tokens=len(flat),
        base_id=base_id,
        description=description,
        n_layers=n_layers,
    )


def _distribution(embeddings: NDArray[np.float32], seed: int) -> TextDistribution:
    x = np.asarray(embeddings, np.float64)
    n, d = x.shape
    mean = x.mean(axis=0)
    stored_type = np.float32 if d <= FULL_PRECISION_D else np.float16
    centred = x - mean
    q = min(_n_directions(d), n - 1, d)
    variances, basis = _leading_directions(centred, q)
    total = float((centred**2).sum()) / max(n - 1, 1)
    rows = np.arange(n)
    if n > N_SAMPLE:
        rows = np.sort(np.random.default_rng(seed).choice(n, N_SAMPLE, replace=False))
    projected = centred[rows] @ projection(d)
    scale = float(np.sqrt((projected**2).mean())) or 1.0
    return TextDistribution(
        n=n,
        mean=mean.astype(stored_type).astype(np.float32),
        basis=basis.astype(np.float16),
        variances=variances.astype(np.float32),
        residual_variance=max(total - float(variances.sum()), 0.0),
        sample=(projected / scale).astype(np.float16),
        sample_scale=scale,
    )


def _n_directions(d: int) -> int:
    mean_size = 4 if d <= FULL_PRECISION_D else 2
    room = FIELD_BYTES - mean_size * d - 2 * N_SAMPLE * N_PROJECTED
    return max(1, min(N_DIRECTIONS, room // (2 * d)))


def _leading_directions(
    centred: NDArray[np.float64], q: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variances (q,) and orthonormal directions (q, d) of rows that sum to zero, (n, d)."""
    from scipy.linalg import eigh

    n, d = centred.shape
    if q == 0:
        return np.zeros(0), np.zeros((0, d))
    # The smaller of the two Gram matrices has the same leading spectrum.
    small = centred @ centred.T if n < d else centred.T @ centred
    size = len(small)
    values, vectors = eigh(small, subset_by_index=[size - q, size - 1])
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    directions = vectors.T @ centred if n < d else vectors.T
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    directions = np.divide(directions, lengths, out=np.zeros_like(directions), where=lengths > 0)
    peaks = np.abs(directions).argmax(axis=1)
    signs = np.where(directions[np.arange(q), peaks] < 0, -1.0, 1.0)
    return values / (n - 1), directions * signs[:, None]


def _input_problems(
    prompt: NDArray[np.float32],
    completion: NDArray[np.float32] | None,
    flat: NDArray[np.int64],
    n_vocab: int,
    description: str,
) -> list[str]:
    problems = []
    fields = {"prompt": prompt, "completion": completion}
    for name, array in fields.items():
        if array is None:
            continue
        if array.ndim != 2 or 0 in array.shape:
            problems.append(f"{name} embeddings have shape {array.shape}, not (n, d)")
        elif not np.isfinite(array).all():
            problems.append(f"{name} embeddings hold NaN or infinity")
        elif np.abs(array).max() > MAX_EMBEDDING:
            problems.append(f"{name} embeddings exceed {MAX_EMBEDDING:g}, the range of float16")
    if completion is not None and prompt.shape[1:] != completion.shape[1:]:
        problems.append("prompt and completion embeddings have different widths")
    if len(flat) and (flat.min() < 0 or flat.max() >= n_vocab):
        problems.append(f"token ids outside the vocabulary of {n_vocab}")
    return problems + description_problems(description)
