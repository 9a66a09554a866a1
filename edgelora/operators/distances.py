"""Distances between one dataset and each of a bank: the paper's on token ids, ours on embeddings.

The paper's four (arXiv:2507.01806, section 3, and its public code) are reproduced with the code's
quirks: n_vocab - 1 histogram bins, so that the last two ids share one; 1e-10 added to densities;
MMD in float32 between 1,000 ids drawn with replacement, anew for each pair. Only the draw differs:
it is seeded. `kl_fixed` and `js_fixed` give each id a bin of its own; the other listed quirk, the
diagonal in the z-score, is not a distance's: `normalized_fixed` in `heads` mends it. Nothing listed
concerns `wd` and `mmd`, so `wd_fixed` and `mmd_fixed` are other names of theirs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import IncompatibleAdapter
from edgelora.operators import embedding_distances as embedding
from edgelora.signature import Histogram, Signature

Distance = Callable[..., NDArray[np.float64]]
EPSILON = 1e-10
N_DRAWN = 1_000
_ON_TOKENS = ("wd", "kl", "js", "mmd")
BANDWIDTHS = (0.2, 0.5, 0.9, 1.3)


def wd(
    target: Signature, others: Sequence[Signature], *, seed: int = 0, **_: object
) -> NDArray[np.float64]:
    """1-D Wasserstein distance between token ids taken as numbers (scipy's)."""
    from scipy.stats import wasserstein_distance

    a = target.histogram
    return np.array(
        [
            wasserstein_distance(a.ids, b.ids, a.counts, b.counts)
            for b in (other.histogram for other in others)
        ]
    )


def kl(
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    fixed: bool = False,
    **_: object,
) -> NDArray[np.float64]:
    """KL(new || bank) between unigram densities with 1e-10 added to each bin."""
    densities = _densities(target, others, fixed)
    return np.array([float((p * np.log(p / q)).sum()) for p, q in densities])


def js(
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    fixed: bool = False,
    **_: object,
) -> NDArray[np.float64]:
    """Jensen-Shannon divergence (not its root) between the same densities, in nats."""
    result = []
    for p, q in _densities(target, others, fixed):
        middle = (p + q) / 2
        kls = (p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()
        result.append(float(kls) / 2)
    return np.array(result)


def mmd(
    target: Signature, others: Sequence[Signature], *, seed: int = 0, **_: object
) -> NDArray[np.float64]:
    """The paper's MMD^2 between 1,000 ids drawn from each side, kernel sum a^2 / (a^2 + d^2).

    The draw depends on the seed and on the pair alone, not on the rest of the bank.
    """
    result = []
    first = _fingerprint(target.histogram)
    for other in others:
        rng = np.random.default_rng([seed, first, _fingerprint(other.histogram)])
        result.append(multiscale_mmd(_draw(target, rng), _draw(other, rng)))
    return np.array(result)


def multiscale_mmd(x: NDArray[np.int64], y: NDArray[np.int64]) -> float:
    """MMD^2 between ids x (m,) and y (n,), V-statistic, with float32 distances as in the paper.

    Squares of ids reach 1e9, where float32 steps by 64: neighbouring ids may lie at distance 0.
    Equal ids are grouped, which changes the order of the sums only.
    """
    xs, nx = np.unique(x, return_counts=True)
    ys, ny = np.unique(y, return_counts=True)
    wx, wy = nx / len(x), ny / len(y)
    same = wx @ _multiscale(xs, xs) @ wx + wy @ _multiscale(ys, ys) @ wy
    return float(same - 2.0 * (wx @ _multiscale(xs, ys) @ wy))


DISTANCES: dict[str, Distance] = {
    "wd": wd,
    "kl": kl,
    "js": js,
    "mmd": mmd,
    "wd_fixed": wd,
    "kl_fixed": partial(kl, fixed=True),
    "js_fixed": partial(js, fixed=True),
    "mmd_fixed": mmd,
    "cosine": embedding.cosine,
    "bures": embedding.bures,
    "sliced": embedding.sliced,
    "sinkhorn": embedding.sinkhorn,
    "rbf_mmd": embedding.rbf_mmd,
    "energy": embedding.energy,
}
_ON_MOMENTS = {"cosine": embedding.MomentBank.cosine, "bures": embedding.MomentBank.bures}
TOKEN_DISTANCES = frozenset(name for name in DISTANCES if name.split("_")[0] in _ON_TOKENS)


def measure(
    name: str,
    target: Signature,
    others: Sequence[Signature],
    *,
    seed: int = 0,
    completion_weight: float = embedding.COMPLETION_WEIGHT,
) -> NDArray[np.float64]:
    """The distance called `name` from a dataset to each of a bank's, checked first: (k,) float64.

    Raises:
        IncompatibleAdapter: signatures of another base, embedding width, vocabulary or number of
            layers; a distance on tokens, and a signature without any.
        KeyError: no such distance.

    Example:
        >>> from edgelora.signature import summarise
        >>> x = np.eye(3, dtype=np.float32)
        >>> s = summarise(x, None, [[1, 2]], n_vocab=4, base_id="b")
        >>> measure("js", s, [s, s]).tolist()
        [0.0, 0.0]
    """
    distance = DISTANCES[name]
    check_comparable(target, others)
    if name in TOKEN_DISTANCES and not all(s.n_tokens for s in (target, *others)):
        raise IncompatibleAdapter(
            f"The distance {name} counts tokens, and one of the signatures has none",
            hint="Choose a distance on embeddings, or leave that adapter out.",
        )
    return distance(target, others, seed=seed, completion_weight=completion_weight)


def prepare(
    name: str, others: Sequence[Signature], *, seed: int = 0
) -> Callable[[Signature], NDArray[np.float64]]:
    """`measure` for one bank and any number of datasets: what concerns the bank alone is done now.

    That is nearly all of it for the distances on moments, nothing for the others.
    """
    if name not in _ON_MOMENTS or not others:
        return lambda target: measure(name, target, others, seed=seed)
    distance = _ON_MOMENTS[name]
    check_comparable(others[0], others)
    bank = embedding.MomentBank(others)

    def compared(target: Signature) -> NDArray[np.float64]:
        check_comparable(target, others)
        return distance(bank, target)

    return compared


def check_comparable(target: Signature, others: Sequence[Signature]) -> None:
    """Raise IncompatibleAdapter unless all signatures come from the same layers of one base."""

    def origin(signature: Signature) -> str:
        return (
            f"base {signature.base_id}, {signature.n_layers or 'all'} layers, width {signature.d}, "
            f"vocabulary {signature.n_vocab}"
        )

    wanted = origin(target)
    problems = [
        f"signature {i}: {origin(other)}"
        for i, other in enumerate(others)
        if origin(other) != wanted
    ]
    if problems:
        raise IncompatibleAdapter(
            f"These signatures cannot be compared with that of the dataset ({wanted})",
            problems=problems,
        )


def split_by_signature(
    signatures: Sequence[Signature | None],
) -> tuple[list[int], list[int]]:
    """Positions of the adapters that have a signature, and of those to be skipped."""
    there = [i for i, signature in enumerate(signatures) if signature is not None]
    absent = [i for i, signature in enumerate(signatures) if signature is None]
    return there, absent


def _densities(
    target: Signature, others: Sequence[Signature], fixed: bool
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """For each pair both densities, over the bins in which either has a token.

    In all other bins both are 1e-10, which adds exactly 0 to either divergence.
    """
    n_bins = target.n_vocab if fixed else target.n_vocab - 1
    own = np.zeros(n_bins)
    _fill(own, target.histogram)
    theirs = np.zeros(n_bins)
    pairs = []
    for other in others:
        theirs[:] = 0.0
        _fill(theirs, other.histogram)
        used = np.flatnonzero((own > 0) | (theirs > 0))
        pairs.append((own[used] + EPSILON, theirs[used] + EPSILON))
    return pairs


def _fill(density: NDArray[np.float64], histogram: Histogram) -> None:
    """Add a histogram to empty bins; np.histogram's last bin is closed, so it takes two ids."""
    bins = np.minimum(histogram.ids, len(density) - 1)
    np.add.at(density, bins, histogram.counts / histogram.counts.sum())


def _draw(signature: Signature, rng: np.random.Generator) -> NDArray[np.int64]:
    counts = signature.histogram.counts
    return rng.choice(signature.histogram.ids, N_DRAWN, p=counts / counts.sum()).astype(np.int64)


def _fingerprint(histogram: Histogram) -> int:
    return zlib.crc32(histogram.counts.tobytes(), zlib.crc32(histogram.ids.tobytes()))


def _multiscale(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.float64]:
    squares = (x**2)[:, None] + (y**2)[None, :]
    products = np.outer(x, y)
    gaps = squares.astype(np.float32) - np.float32(2.0) * products.astype(np.float32)
    kernel = np.zeros(gaps.shape, np.float32)
    for a in BANDWIDTHS:
        kernel += np.float32(a**2) / (np.float32(a**2) + gaps)
    return kernel.astype(np.float64)
