"""The records: a text field as a distribution, token counts, and both as a signature."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_PROJECTED = 32
MAX_D = 65_536
MAX_LAYERS = 10_000
MAX_DESCRIPTION = 2_000
MAX_VALUE = 1e12  # hidden states reach 25,000; distances square what they are given, twice
_PROJECTION_LABEL = b"EdgeLoRA random projection, version 1"


@dataclass(frozen=True, eq=False)
class TextDistribution:
    """The embeddings of one text field (prompts, or completions) of a dataset.

    Attributes:
        n: number of texts.
        mean: (d,) float32.
        basis: (q, d) float16, orthonormal rows: the leading directions of the covariance.
        variances: (q,) float32, the variance along each (unbiased; 0 for a single text).
        residual_variance: the variance that the q directions leave out, summed over dimensions.
        sample: (m, p) float16: a seeded sample of texts, (embedding - mean) @ projection(d) divided
            by `sample_scale`. The projection is the same for every signature, whatever the seed.
        sample_scale: float > 0.
    """

    n: int
    mean: NDArray[np.float32]
    basis: NDArray[np.float16]
    variances: NDArray[np.float32]
    residual_variance: float
    sample: NDArray[np.float16]
    sample_scale: float

    def points(self) -> NDArray[np.float64]:
        """The sample in projected space with the mean put back: (m, p) float64."""
        centre = self.mean.astype(np.float64) @ projection(len(self.mean))
        return self.sample.astype(np.float64) * self.sample_scale + centre

    def factor(self) -> NDArray[np.float64]:
        """(q, d) float64 whose Gram `factor.T @ factor` is the low-rank covariance."""
        scale = np.sqrt(self.variances.astype(np.float64))
        return self.basis.astype(np.float64) * scale[:, None]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Sparse counts of token ids.

    Attributes:
        ids: (u,) int32, strictly increasing.
        counts: (u,) int32, each at least 1.
    """

    ids: NDArray[np.int32]
    counts: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Signature:
    """A dataset as a distribution, for one base.

    Attributes:
        prompt: the prompts' embeddings (or those of a description).
        completion: the completions' embeddings; None without completions.
        histogram: token counts of prompts and completions together.
        n_vocab: size of the base's vocabulary.
        n_tokens: sum of the counts.
        base_id: identity of the base that embedded the texts.
        description: free text of at most 2,000 characters, may be empty.
        n_layers: the layers that its embeddings come from; 0 means all, after the last norm. Only
            signatures of the same layers can be compared.
    """

    prompt: TextDistribution
    completion: TextDistribution | None
    histogram: Histogram
    n_vocab: int
    n_tokens: int
    base_id: str
    description: str
    n_layers: int = 0

    @property
    def d(self) -> int:
        """Width of the embeddings."""
        return len(self.prompt.mean)

    def fields(self) -> dict[str, TextDistribution]:
        """The text fields that are there, by name: `prompt` and maybe `completion`."""
        fields = {"prompt": self.prompt}
        if self.completion is not None:
            fields["completion"] = self.completion
        return fields

    def to_bytes(self) -> bytes:
        """This signature as a safetensors file; the same signature gives the same bytes."""
        from edgelora.signature import storage

        return storage.to_bytes(self)


@functools.lru_cache(maxsize=2)
def projection(d: int) -> NDArray[np.float64]:
    """(d, p) float64: the random signs / sqrt(p) that project every embedding of width d.

    Signs come from SHAKE-256, not from a random generator whose stream a library may change: files
    written years apart must share them. Squared distances are kept in expectation (Achlioptas,
    2003, "Database-friendly random projections", theorem 1.1). The array is kept, and read-only.
    """
    stream = hashlib.shake_256(_PROJECTION_LABEL).digest(d * N_PROJECTED // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8)).reshape(d, N_PROJECTED)
    signs = (bits.astype(np.float64) * 2.0 - 1.0) / math.sqrt(N_PROJECTED)
    signs.setflags(write=False)
    return signs


def find_problems(signature: Signature) -> list[str]:
    """Every reason why a signature is not sound: shapes, bounds, NaN, infinity."""
    problems = description_problems(signature.description)
    if not 0 <= signature.n_layers <= MAX_LAYERS:
        problems.append(f"embeddings from {signature.n_layers} layers")
    for name, field in signature.fields().items():
        problems += [f"{name}: {problem}" for problem in _field_problems(field, signature.d)]
    ids, counts = signature.histogram.ids, signature.histogram.counts
    if len(ids) and (ids[0] < 0 or ids[-1] >= signature.n_vocab or (np.diff(ids) <= 0).any()):
        problems.append("token ids that do not increase or lie outside the vocabulary")
    if (counts < 1).any() or int(counts.sum(dtype=np.int64)) != signature.n_tokens:
        problems.append("token counts below 1, or whose sum is not n_tokens")
    return problems


def _field_problems(field: TextDistribution, d: int) -> list[str]:
    problems = []
    q = len(field.variances)
    m = len(field.sample)
    shapes = (field.mean.shape, field.basis.shape, field.variances.shape, field.sample.shape)
    if shapes != ((d,), (q, d), (q,), (m, N_PROJECTED)) or not 1 <= d <= MAX_D or m < 1:
        return [f"shapes {shapes} do not fit together"]
    arrays = (field.mean, field.basis, field.variances, field.sample)
    scalars = (field.residual_variance, field.sample_scale)
    if not (all(np.isfinite(a).all() for a in arrays) and all(map(math.isfinite, scalars))):
        problems.append("NaN or infinity")
    elif (
        max(float(np.abs(field.mean).max()), field.sample_scale) > MAX_VALUE
        or max(*field.variances.tolist(), field.residual_variance, 0.0) > MAX_VALUE**2
    ):
        problems.append(f"values beyond {MAX_VALUE:g}, which no embedding has")
    if (field.variances < 0).any() or field.residual_variance < 0 or field.sample_scale <= 0:
        problems.append("a negative variance, or a scale that is not positive")
    if field.n < m or q > min(d, max(field.n - 1, 0)):
        problems.append(f"{field.n} texts cannot give {m} samples and {q} directions")
    return problems


def description_problems(description: str) -> list[str]:
    """Why a description cannot be kept, if so."""
    if len(description) <= MAX_DESCRIPTION:
        return []
    return [f"the description has {len(description)} characters; the limit is {MAX_DESCRIPTION}"]
