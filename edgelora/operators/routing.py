"""Which of several datasets a text belongs to, if to any, by its embedding and their signatures.

Scores compare a text with the stored samples, in the projected space that all signatures share;
higher is nearer. A score becomes a choice through a threshold that is calibrated leave-one-out:
the samples of each known dataset are scored as if neither it nor any dataset of the same source
were known, and the threshold is passed by the wanted share of them, or by fewer where a score has
a floor. No base is needed for it.
What is NOT covered: texts unlike anything in the calibration may pass more, or less, often.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EdgeLoRAError
from edgelora.signature import TextDistribution
from edgelora.signature.record import projection

FALSE_ACCEPTS = 0.05
MIN_FOREIGN = 8  # datasets; with fewer, the share that passes is a matter of luck
MIN_TEXTS = 4  # of a dataset that is chosen; the signature of a description has one
SHRINKAGE = 0.1  # share of the isotropic covariance that is mixed in
N_PRIOR = 128  # texts that the pooled covariance weighs in a dataset's own
N_NEAREST = 3
Array = NDArray[np.float64]
Score = Callable[[Array], Array]  # (n, p) texts -> (n, k): how near each is to each dataset


class Uncalibrated(EdgeLoRAError):
    """There is too little to compare with for a threshold that means anything."""


@dataclass(frozen=True, eq=False)
class Cloud:
    """The prompts of one dataset in the projected space.

    Attributes:
        mean: (p,) float64, of all n prompts.
        points: (m, p) float64, a sample of them.
        sources: names of what the dataset was made from; two that share one are siblings.
        n_layers: see Signature.
    """

    n: int
    mean: Array
    points: Array
    sources: frozenset[str] = frozenset()
    n_layers: int = 0

    @functools.cached_property
    def scatter(self) -> Array:
        """(p, p): the sum of squares of the sample around its own mean."""
        centred = self.points - self.points.mean(axis=0)
        return np.asarray(centred.T @ centred, np.float64)

    def is_sibling(self, other: Cloud) -> bool:
        """Whether both are made from one source, or are the same."""
        return self is other or bool(self.sources & other.sources)


@dataclass(frozen=True, eq=False)
class Routes:
    """k datasets to choose from.

    Attributes:
        threshold: the best score has to exceed it.
        n_foreign: datasets that it was calibrated with.
        n_layers: what is compared has to be embedded after as many.
    """

    names: tuple[str, ...]
    score: Score
    threshold: float
    n_foreign: int
    n_layers: int = 0

    def nearest(self, embedding: NDArray[np.float32]) -> tuple[str, float]:
        """The nearest dataset and its score.

        Args:
            embedding: (d,) float32, of the base that made the signatures.
        """
        scores = self.score(project(embedding[None]))[0]
        position = int(scores.argmax())
        return self.names[position], float(scores[position])


def make_cloud(
    field: TextDistribution, sources: frozenset[str] = frozenset(), n_layers: int = 0
) -> Cloud:
    """A dataset's prompts, from its signature."""
    return Cloud(field.n, project(field.mean[None])[0], field.points(), sources, n_layers)


def project(embeddings: NDArray[np.float32]) -> Array:
    """(n, d) float32 embeddings in the projected space, (n, p) float64."""
    return np.asarray(embeddings.astype(np.float64) @ projection(embeddings.shape[1]))


def fit_routes(
    candidates: Mapping[str, Cloud],
    others: Sequence[Cloud],
    *,
    method: str = "likelihood-ratio",
    false_accepts: float = FALSE_ACCEPTS,
) -> Routes:
    """Routes to `candidates`, with a threshold that `false_accepts` of foreign prompts may pass.

    Args:
        others: further datasets, that nothing is routed to: more of what is foreign.
        method: a name of SCORES.

    Raises:
        Uncalibrated: no candidate has MIN_TEXTS prompts, fewer than MIN_FOREIGN datasets are
            foreign to some candidate, all prompts are one and the same, or they were embedded after
            different numbers of layers.
    """
    n_layers = _common_layers(candidates, others)
    usable = {name: cloud for name, cloud in candidates.items() if cloud.n >= MIN_TEXTS}
    if not usable:
        raise Uncalibrated(f"no adapter has a signature of at least {MIN_TEXTS} prompts")
    targets = list(usable.values())
    everything = [*candidates.values(), *others]
    fit = SCORES[method]
    best = []
    for foreign in everything:
        rivals = [cloud for cloud in targets if not cloud.is_sibling(foreign)]
        known = [cloud for cloud in everything if not cloud.is_sibling(foreign)]
        if rivals:
            best.append(fit(rivals, known)(foreign.points).max(axis=1))
    if len(best) < MIN_FOREIGN:
        raise Uncalibrated(
            f"a threshold needs the signatures of {MIN_FOREIGN} datasets from other sources than "
            f"an adapter's, and there are {len(best)}"
        )
    threshold = max(_upper_quantile(best, false_accepts), FLOORS.get(method, -np.inf))
    return Routes(tuple(usable), fit(targets, everything), threshold, len(best), n_layers)


def _common_layers(candidates: Mapping[str, Cloud], others: Sequence[Cloud]) -> int:
    found = {cloud.n_layers for cloud in (*candidates.values(), *others)}
    if len(found) > 1:
        raise Uncalibrated(
            "signatures from different layers cannot be compared: "
            + ", ".join(f"{n or 'all'} layers" for n in sorted(found))
        )
    return found.pop() if found else 0


def likelihood_ratio(candidates: Sequence[Cloud], known: Sequence[Cloud]) -> Score:
    """Log-likelihood under a dataset's Gaussian minus that under the one of all prompts, in nats.

    A dataset's covariance is its own with the pooled one as a prior of N_PRIOR texts (regularised
    discriminant analysis: Friedman, 1989). The ratio tells nearness to a dataset from being an
    ordinary prompt (as the relative Mahalanobis distance of Ren et al., 2021, arXiv:2106.09022).
    """
    pooled = _pooled(known)
    one_each = np.stack([_posterior(cloud, pooled) for cloud in candidates])
    dataset = _gaussian(np.stack([cloud.mean for cloud in candidates]), one_each)
    centre, total = _total(known)
    anything = _gaussian(centre[None], total[None])
    return lambda x: dataset(x) - anything(x)


def mahalanobis(candidates: Sequence[Cloud], known: Sequence[Cloud]) -> Score:
    """Minus half the squared distance to the mean, in units of the pooled covariance."""
    whitener = _whitener(_pooled(known))
    means = np.stack([cloud.mean for cloud in candidates]) @ whitener
    return lambda x: -0.5 * _squared(x @ whitener, means)


def nearest_texts(candidates: Sequence[Cloud], known: Sequence[Cloud]) -> Score:
    """Minus half the mean squared distance to the three nearest texts, in the same units."""
    whitener = _whitener(_pooled(known))
    samples = [cloud.points @ whitener for cloud in candidates]

    def score(x: Array) -> Array:
        white = x @ whitener
        nearest = [np.sort(_squared(white, sample))[:, :N_NEAREST] for sample in samples]
        return -0.5 * np.stack([rows.mean(axis=1) for rows in nearest], axis=1)

    return score


def whitened_cosine(candidates: Sequence[Cloud], known: Sequence[Cloud]) -> Score:
    """Cosine with the mean, centred at all prompts and whitened by their covariance."""
    centre, total = _total(known)
    whitener = _whitener(total)
    means = _unit((np.stack([cloud.mean for cloud in candidates]) - centre) @ whitener)
    return lambda x: _unit((x - centre) @ whitener) @ means.T


def cosine(candidates: Sequence[Cloud], known: Sequence[Cloud]) -> Score:
    """Cosine with the mean, as embeddings come; what they all share is most of it."""
    means = _unit(np.stack([cloud.mean for cloud in candidates]))
    return lambda x: _unit(x) @ means.T


SCORES: dict[str, Callable[[Sequence[Cloud], Sequence[Cloud]], Score]] = {
    "likelihood-ratio": likelihood_ratio,
    "mahalanobis": mahalanobis,
    "nearest-texts": nearest_texts,
    "whitened-cosine": whitened_cosine,
    "cosine": cosine,
}
# Where all that is known as foreign is far away, the calibration alone would let much pass that is
# far away too. A negative ratio says: more like an ordinary prompt than like the dataset's.
FLOORS = {"likelihood-ratio": 0.0}


def _upper_quantile(groups: Sequence[Array], share: float) -> float:
    """The smallest of the values that at most `share` of them exceed, each group counting once."""
    values = np.concatenate(groups)
    weights = np.concatenate([np.full(len(group), 1.0 / len(group)) for group in groups])
    order = np.argsort(values)
    above = len(groups) - np.cumsum(weights[order])
    return float(values[order][np.argmax(above <= share * len(groups) + 1e-9)])


def _pooled(clouds: Sequence[Cloud]) -> Array:
    """The covariance within datasets, each text counting once, shrunk towards isotropy.

    Raises:
        Uncalibrated: no dataset has two different prompts.
    """
    scatter = sum(cloud.scatter for cloud in clouds)
    freedom = sum(len(cloud.points) - 1 for cloud in clouds)
    covariance = np.asarray(scatter / max(freedom, 1), np.float64)
    isotropic = np.trace(covariance) / len(covariance)
    if not isotropic > 0:
        raise Uncalibrated("no signature holds two different prompts: there is no spread")
    shrunk = (1.0 - SHRINKAGE) * covariance + SHRINKAGE * isotropic * np.eye(len(covariance))
    return np.asarray(shrunk, np.float64)


def _posterior(cloud: Cloud, pooled: Array) -> Array:
    own = len(cloud.points)
    return (N_PRIOR * pooled + cloud.scatter) / (N_PRIOR + own - 1)


def _total(clouds: Sequence[Cloud]) -> tuple[Array, Array]:
    """Mean (p,) and covariance (p, p) of all prompts, each dataset counting once.

    The part between datasets is added to the shrunk one within them, so it is never singular.
    """
    means = np.stack([cloud.mean for cloud in clouds])
    centre = means.mean(axis=0)
    between = (means - centre).T @ (means - centre) / len(clouds)
    return centre, _pooled(clouds) + between


def _gaussian(means: Array, covariances: Array) -> Score:
    """Log-densities of k Gaussians, without the constant that they share."""
    factors = np.linalg.cholesky(covariances)
    whiteners = np.linalg.inv(factors)
    log_volumes = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)

    def log_density(x: Array) -> Array:
        white = (x[None] - means[:, None]) @ whiteners.swapaxes(1, 2)
        return np.asarray(-0.5 * (white**2).sum(axis=2).T - log_volumes)

    return log_density


def _whitener(covariance: Array) -> Array:
    """(p, p): rows times it have the identity as covariance."""
    return np.asarray(np.linalg.inv(np.linalg.cholesky(covariance)).T)


def _squared(x: Array, y: Array) -> Array:
    """(n, m) squared distances."""
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(x, y, "sqeuclidean"), np.float64)


def _unit(rows: Array) -> Array:
    """Rows of length 1; a zero row stays."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0))
