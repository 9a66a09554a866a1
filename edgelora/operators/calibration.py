"""Temperatures, shortlists and priors of a bank's operators, fitted on the bank itself.

Each of n datasets of the bank takes a turn as the user's, leave-one-source-out: only adapters from
other sources may serve it. Which of them it ought to choose is told by measured losses (those that
bring at least half of what the best one brings), or, without losses, by categories (the same one).
A temperature is the one under which the weight of those adapters has the greatest mean logarithm: a
proper scoring rule, as in temperature scaling (Guo et al., 2017, arXiv:1706.04599), so a weight
becomes the probability of choosing well. What is NOT fitted: the loss of a combination itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EdgeLoRAError
from edgelora.operators.mixture import GAP, rate_of, solve

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

MIN_TARGETS = 8  # datasets; with fewer, a temperature is a matter of luck
SHARE = 0.9
HELPFUL = 0.5  # of what the best adapter brings
# lambda of mixture matching, in units of the spread of its slopes; the default is among them.
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_KL = 1e-3  # to which weights of mixture matching are solved, nats
_FLOOR = 1e-12
_N_GRID = 49


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a bank tells of its n adapters and the datasets that they were trained on.

    Attributes:
        names: of the adapters.
        sources: of each dataset; two that share one do not serve each other.
        categories: of each dataset, "" where it is not known.
        distances: name -> (n, n) float64, [i, j] from dataset i to that of adapter j; what is not
            finite is not known.
        gram: (n, n), mean kernels between the datasets (see mixture.kernel_means), or None.
        losses: (2, n, n) nats a token, [h, i, j] of adapter j on half h of some lines of dataset i,
            NaN where it was not measured; or None.
        base_losses: (2, n), of the base.
    """

    names: Sequence[str]
    sources: Sequence[frozenset[str]]
    categories: Sequence[str]
    distances: Mapping[str, Array]
    gram: Array | None = None
    losses: Array | None = None
    base_losses: Array | None = None


@dataclass(frozen=True)
class Fit:
    """A temperature, and what it is worth.

    Attributes:
        temperature: of a softmin; for mixture matching lambda, in units of the slopes' spread.
        score, uniform: mean log-weight of the right adapters under it, and under equal weights.
    """

    temperature: float
    score: float
    uniform: float


@dataclass(frozen=True)
class Calibration:
    """What was fitted.

    Attributes:
        evidence: "losses" or "categories".
        n_targets: datasets that took a turn.
        share: of them, for which the shortlist holds the best adapter.
        distances: by distance: of the softmin of distances.
        shortlists: by distance: how many of the nearest adapters that takes.
        mixture, gibbs: None where there was nothing to fit them on.
        priors: by adapter, how probable it is that it helps a dataset of another source; {} without
            losses.
    """

    evidence: str
    n_targets: int
    share: float
    distances: Mapping[str, Fit]
    shortlists: Mapping[str, int]
    mixture: Fit | None = None
    gibbs: Fit | None = None
    priors: Mapping[str, float] = field(default_factory=dict)


def calibrate(
    evidence: Evidence,
    *,
    left_out: frozenset[str] = frozenset(),
    share: float = SHARE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Fit everything that the evidence allows.

    Args:
        left_out: sources that take no part, neither as datasets nor as adapters: for an outer fold
            that is evaluated on them (nested leave-one-source-out).
        progress: (steps of mixture matching done, in all).

    Raises:
        EdgeLoRAError: fewer than MIN_TARGETS datasets have an adapter to choose.
        ValueError: shapes that do not fit, or no distance.
    """
    _check(evidence)
    allowed = _allowed(evidence, left_out)
    wanted = wanted_adapters(evidence, allowed)
    targets = np.flatnonzero(wanted.any(axis=1))
    if len(targets) < MIN_TARGETS:
        raise _too_few(evidence, len(targets))
    counted = _Counted(evidence, allowed)
    judge = _Judge(allowed, wanted, targets, counted.log_priors())
    best = _best(evidence, allowed, wanted)
    return Calibration(
        evidence="categories" if evidence.losses is None else "losses",
        n_targets=len(targets),
        share=share,
        distances={name: _fit_softmin(d, judge) for name, d in evidence.distances.items()},
        shortlists={
            name: _shortlist(d, allowed, best, targets, share)
            for name, d in evidence.distances.items()
        },
        mixture=None if evidence.gram is None else _fit_mixture(evidence.gram, judge, progress),
        gibbs=_fit_gibbs(evidence, allowed, judge),
        priors=counted.priors(),
    )


def wanted_adapters(evidence: Evidence, allowed: Mask) -> Mask:
    """Which adapters each dataset ought to choose, (n, n); none where nothing tells."""
    if evidence.losses is None:
        categories = np.array(evidence.categories, object)
        same = categories[:, None] == categories[None, :]
        return np.asarray(allowed & same & (categories != "")[:, None], np.bool_)
    return _helpful(_gains(evidence, slice(None)), allowed)


@dataclass(frozen=True, eq=False)
class _Judge:
    """Scores weights by what they give the right adapters.

    Attributes:
        log_priors: (n, n), of adapter j without what the sources of dataset i tell of it.
    """

    allowed: Mask
    wanted: Mask
    targets: NDArray[np.intp]
    log_priors: Array

    def score(self, log_weights: Array) -> float:
        """Mean log-weight of the right adapters, for (n, n) logarithms of unnormalised weights."""
        rows = np.where(self.allowed, log_weights + self.log_priors, -np.inf)[self.targets]
        rows -= rows.max(axis=1, keepdims=True)
        weights = np.exp(rows)
        right = np.where(self.wanted[self.targets], weights, 0.0).sum(axis=1)
        return float(np.log(np.maximum(right / weights.sum(axis=1), _FLOOR)).mean())

    def uniform(self) -> float:
        """The score of equal weights, without priors."""
        shares = self.wanted[self.targets].sum(axis=1) / self.allowed[self.targets].sum(axis=1)
        return float(np.log(shares).mean())


class _Counted:
    """How often each adapter helps datasets of other sources."""

    def __init__(self, evidence: Evidence, allowed: Mask) -> None:
        self._names = evidence.names
        self._known = evidence.losses is not None
        n = len(evidence.names)
        self._measured = self._helped = np.zeros((n, n))
        self._related = _related(evidence.sources).astype(np.float64)
        self._takes_part: list[bool] = np.atleast_1d(allowed.any(axis=0)).tolist()
        if self._known:
            gains = _gains(evidence, slice(None))
            measured = allowed & np.isfinite(gains)
            self._measured = measured.astype(np.float64)
            self._helped = (measured & (np.nan_to_num(gains) > 0)).astype(np.float64)

    def priors(self) -> dict[str, float]:
        """(helped + 1) / (measured + 2), Laplace's rule of succession."""
        if not self._known:
            return {}
        values = (self._helped.sum(axis=0) + 1.0) / (self._measured.sum(axis=0) + 2.0)
        return {
            name: float(value)
            for name, value, takes_part in zip(self._names, values, self._takes_part, strict=True)
            if takes_part
        }

    def log_priors(self) -> Array:
        """(n, n): for dataset i without the datasets that share a source with it."""
        helped = self._helped.sum(axis=0) - self._related @ self._helped
        measured = self._measured.sum(axis=0) - self._related @ self._measured
        return np.asarray(np.log((helped + 1.0) / (measured + 2.0)))


def _fit_softmin(costs: Array, judge: _Judge) -> Fit:
    """The temperature of softmin(costs), by a grid and then Brent's method around its best."""
    from scipy.optimize import minimize_scalar

    clean = np.where(judge.allowed, costs, 0.0)
    spread = float(np.std(clean[judge.allowed]))
    if not spread > 0:
        return Fit(1.0, judge.score(np.zeros_like(costs)), judge.uniform())

    def loss(log_temperature: float) -> float:
        return -judge.score(-clean / np.exp(log_temperature))

    grid = np.log(spread) + np.linspace(-6.0, 6.0, _N_GRID)
    losses = [loss(float(x)) for x in grid]
    at = int(np.argmin(losses))
    low, high = grid[max(at - 1, 0)], grid[min(at + 1, _N_GRID - 1)]
    found = minimize_scalar(loss, bounds=(float(low), float(high)), method="bounded")
    best, least = (found.x, found.fun) if found.fun < losses[at] else (grid[at], losses[at])
    return Fit(float(np.exp(best)), -float(least), judge.uniform())


def _fit_mixture(gram: Array, judge: _Judge, progress: Callable[[int, int], None]) -> Fit:
    """The best of STRENGTHS; the datasets are compared in the one space of the whole bank."""
    scores = []
    total = len(STRENGTHS) * len(judge.targets)
    for number, strength in enumerate(STRENGTHS):
        log_weights = np.full(gram.shape, -np.inf)
        for done, i in enumerate(judge.targets):
            progress(number * len(judge.targets) + done, total)
            others = np.flatnonzero(judge.allowed[i])
            inner, cross = gram[np.ix_(others, others)], gram[i, others]
            rate = rate_of(inner, cross, strength)
            weights, _ = solve(inner, cross, rate, wanted_gap=max(_KL * rate, GAP))
            log_weights[i, others] = np.log(np.maximum(weights, _FLOOR))
        scores.append(judge.score(log_weights))
    progress(total, total)
    best = int(np.argmax(scores))
    return Fit(STRENGTHS[best], scores[best], judge.uniform())


def _fit_gibbs(evidence: Evidence, allowed: Mask, judge: _Judge) -> Fit | None:
    """Weights from the losses on one half of the lines, judged by those on the other, both ways."""
    if evidence.losses is None:
        return None
    helpful = [_helpful(_gains(evidence, slice(h, h + 1)), allowed) for h in (0, 1)]
    targets = [i for i in judge.targets if all(half[i].any() for half in helpful)]
    if len(targets) < MIN_TARGETS:
        return None
    twice = _Judge(
        np.concatenate([allowed, allowed]),
        np.concatenate(helpful),
        np.concatenate([targets, np.array(targets) + len(allowed)]),
        np.concatenate([judge.log_priors, judge.log_priors]),
    )
    return _fit_softmin(np.concatenate([evidence.losses[1], evidence.losses[0]]), twice)


def _shortlist(
    costs: Array, allowed: Mask, best: Mask, targets: NDArray[np.intp], share: float
) -> int:
    """How many of the nearest adapters hold a best one for `share` of the datasets."""
    places = []
    for i in targets:
        others = np.flatnonzero(allowed[i])
        order = others[np.argsort(costs[i, others], kind="stable")]
        places.append(int(np.argmax(best[i, order])) + 1)
    return int(np.quantile(places, share, method="inverted_cdf"))


def _best(evidence: Evidence, allowed: Mask, wanted: Mask) -> Mask:
    """The one adapter of the largest gain; without losses, any of the same category."""
    if evidence.losses is None:
        return wanted
    gains = np.where(wanted, _gains(evidence, slice(None)), -np.inf)
    best = np.zeros_like(wanted)
    best[np.arange(len(best)), gains.argmax(axis=1)] = True
    return np.asarray(best & wanted, np.bool_)


def _gains(evidence: Evidence, halves: slice) -> Array:
    """(n, n): by how much each adapter lowers the base's loss, NaN where it was not measured."""
    assert evidence.losses is not None and evidence.base_losses is not None
    base = evidence.base_losses[halves].mean(axis=0)
    return np.asarray(base[:, None] - evidence.losses[halves].mean(axis=0))


def _helpful(gains: Array, allowed: Mask) -> Mask:
    known = np.where(allowed & np.isfinite(gains), gains, -np.inf)
    best = known.max(axis=1, keepdims=True)
    return np.asarray((best > 0) & (known >= HELPFUL * best), np.bool_)


def _allowed(evidence: Evidence, left_out: frozenset[str]) -> Mask:
    """(n, n): whether adapter j may serve dataset i."""
    inside = np.array([not (left_out & sources) for sources in evidence.sources])
    allowed = ~_related(evidence.sources) & inside[:, None] & inside[None, :]
    for costs in evidence.distances.values():
        allowed &= np.isfinite(costs)
    if evidence.losses is not None:  # what was not measured cannot be known to be right or wrong
        allowed &= np.isfinite(evidence.losses).all(axis=0)
    return np.asarray(allowed, np.bool_)


def _related(sources: Sequence[frozenset[str]]) -> Mask:
    """(n, n): the same dataset, or one that shares a source."""
    n = len(sources)
    related = [
        [i == j or bool(a & b) for j, b in enumerate(sources)] for i, a in enumerate(sources)
    ]
    return np.array(related, np.bool_).reshape(n, n)


def _check(evidence: Evidence) -> None:
    n = len(evidence.names)
    if not len(evidence.sources) == len(evidence.categories) == n or not evidence.distances:
        raise ValueError("names, sources and categories differ in number, or there is no distance")
    square = [*evidence.distances.values(), *([] if evidence.gram is None else [evidence.gram])]
    if any(matrix.shape != (n, n) for matrix in square):
        raise ValueError(f"matrices that are not {n} x {n}")
    if evidence.losses is None:
        return
    base = evidence.base_losses
    if evidence.losses.shape != (2, n, n) or base is None or base.shape != (2, n):
        raise ValueError(f"losses that are not 2 x {n} x {n}, or of the base not 2 x {n}")


def _too_few(evidence: Evidence, n_targets: int) -> EdgeLoRAError:
    if evidence.losses is not None:
        why, hint = "are helped by an adapter from another source", "A larger bank"
    else:
        why = "have an adapter of the same category from another source"
        hint = "Losses (--data-glob), or categories and sources in the cards of adapters,"
    return EdgeLoRAError(
        f"{n_targets} of the bank's {len(evidence.names)} signed datasets {why}; a calibration "
        f"needs {MIN_TARGETS}",
        hint=f"{hint} would tell more. Without a calibration builds use their defaults.",
    )
