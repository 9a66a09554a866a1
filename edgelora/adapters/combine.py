"""Several LoRAs into one, tensor by tensor, with the error that this makes.

The exact combination of adapters i is `sum_i scale * c_i * s_i * B_i @ A_i`, of rank up to the sum
of the ranks. `cat` keeps it whole, `svd` finds the best update of a smaller rank, `linear` averages
the factors as arXiv:2507.01806 does. Pairs are read from their sources when their turn comes.
Not covered: rotations of the factors before averaging; ways to settle conflicting signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelora.adapters.krylov import best_of_dense
from edgelora.adapters.lora import LoraPair
from edgelora.adapters.lora_layout import PairPlan
from edgelora.adapters.lowrank import (
    Factors,
    grams,
    product_distance,
    reduced,
    root_of,
)
from edgelora.adapters.terms import Source, Terms, terms_of
from edgelora.errors import EdgeLoRAError, IncompatibleAdapter, UnsupportedFile

# One for each adapter; or for each tensor's name one for each adapter, (k,), or one for each
# rank-one component of each adapter, (k, r), padded to the largest rank.
Coefficients = Sequence[float] | Mapping[str, ArrayLike]

AUTO = "auto"


@dataclass(frozen=True)
class TensorReport:
    """What combining did to one tensor.

    Attributes:
        rank: of the update that was made; stacked_rank: the sum of the sources' ranks.
        norm: Frobenius norm of the exact combination.
        error: Frobenius norm of (made - exact) divided by `norm`.
        excess: a bound on how much of `error` the best update of this rank would save. 0 for
            methods that do not look for the best.
    """

    name: str
    rank: int
    stacked_rank: int
    norm: float
    error: float
    excess: float = 0.0


@dataclass(frozen=True)
class Combination:
    """A combination: sizes and errors are known, values come from `pairs`.

    Attributes:
        cancelled: tensors whose exact combination is zero; they are left out.
    """

    plan: tuple[PairPlan, ...]
    reports: tuple[TensorReport, ...]
    cancelled: tuple[str, ...]
    _make: Callable[[PairPlan], LoraPair]

    @property
    def error(self) -> float:
        """The relative Frobenius error of all tensors together."""
        return self._share([report.error for report in self.reports])

    @property
    def excess(self) -> float:
        """A bound on how much of `error` the best updates of these ranks would save."""
        least = self._share([report.error - report.excess for report in self.reports])
        return self.error - least

    def _share(self, errors: Sequence[float]) -> float:
        """Relative errors of the tensors as one of all."""
        norms = [report.norm for report in self.reports]
        lost = math.fsum((e * n) ** 2 for e, n in zip(errors, norms, strict=True))
        return math.sqrt(lost / math.fsum(norm**2 for norm in norms))

    def pairs(self) -> Iterator[LoraPair]:
        """The combined updates (float32, scale 1) in the plan's order, one alive at a time."""
        return (self._make(planned) for planned in self.plan)


class Kept(Protocol):
    """Where factors lie between planning and writing; a dict will do."""

    def __setitem__(self, name: str, factors: Factors, /) -> None:
        """Keep those of one tensor."""

    def __getitem__(self, name: str, /) -> Factors:
        """Give them back."""


@dataclass(frozen=True)
class Made:
    """What a method makes of one tensor: norms are absolute, `norm` is 0 where all cancelled.

    Attributes:
        factors: None where they are made again when their turn comes.
    """

    rank: int
    norm: float
    error: float = 0.0
    excess: float = 0.0
    factors: Factors | None = None


@dataclass(frozen=True)
class Method:
    """One way to combine.

    Attributes:
        make: what comes out of a tensor's terms, at the wanted rank.
        factors: the factors, for a method whose `make` does not keep them.
    """

    make: Callable[[Terms, int | None], Made]
    factors: Callable[[Terms], Factors] | None = None
    takes_rank: bool = False
    equal_ranks: bool = False


def combine(
    method: str,
    sources: Sequence[Source],
    coefficients: Coefficients,
    *,
    rank: int | str = AUTO,
    scale: float = 1.0,
    kept: Kept | None = None,
    progress: Callable[[int], None] = lambda n_tensors: None,
) -> Combination:
    """Make the combination `sum_i scale * c_i * (update of source i)` and measure its error.

    Args:
        method: a key of COMBINATIONS.
        coefficients: one for each source, or a mapping from every tensor's name to such a list,
            or to a matrix with one for each rank-one component of each source (see Coefficients).
            Zeros are dropped. A tensor that a source does not adapt gets nothing from it.
        rank: of the result, for svd: a number, or "auto" for 99 % of the energy with at most 64.
            A tensor whose exact combination has a smaller rank gets that.
        scale: multiplies every coefficient.
        kept: where the factors that svd makes lie until they are asked for; in memory if None.
        progress: called with 1 after each tensor.

    Raises:
        EdgeLoRAError: unusable coefficients, scale or rank, or a result that is zero everywhere.
        IncompatibleAdapter: sources that adapt one tensor at different shapes.
        UnsupportedFile: linear with different ranks.
        InvalidFile: a source holds NaN or infinite values.
    """
    if method not in COMBINATIONS:
        raise EdgeLoRAError(f"no combination {method!r}", hint=f"Known: {', '.join(COMBINATIONS)}")
    way = COMBINATIONS[method]
    names = list(dict.fromkeys(name for source in sources for name in source.plan))
    weights = _weights_of(names, sources, coefficients, scale)
    wanted = _wanted_rank(method, rank)
    _refuse_mismatches(sources, weights, way.equal_ranks)
    found = _Found({} if kept is None else kept)
    for name in names:
        terms = terms_of(name, sources, weights[name], scale)
        if terms.sources:
            found.add(terms, way.make(terms, wanted))
        progress(1)
    if not found.plan:
        raise EdgeLoRAError(
            "the combined adapter is zero everywhere", hint="Choose other coefficients."
        )

    def factors_of(planned: PairPlan) -> LoraPair:
        name = planned.name
        if way.factors is None:
            lora_a, lora_b = found.kept[name]
        else:
            lora_a, lora_b = way.factors(terms_of(name, sources, weights[name], scale))
        return LoraPair(name, lora_a, lora_b, 1.0)

    return Combination(tuple(found.plan), tuple(found.reports), tuple(found.cancelled), factors_of)


class _Found:
    """What is known of the tensors so far."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.plan: list[PairPlan] = []
        self.reports: list[TensorReport] = []
        self.cancelled: list[str] = []

    def add(self, terms: Terms, made: Made) -> None:
        """One more tensor."""
        if not made.norm:
            self.cancelled.append(terms.name)
            return
        n_out, n_in = terms.shape
        self.plan.append(PairPlan(terms.name, made.rank, n_in, n_out))
        error, excess = made.error / made.norm, made.excess / made.norm
        report = TensorReport(terms.name, made.rank, terms.stacked_rank, made.norm, error, excess)
        self.reports.append(report)
        if made.factors is not None:
            self.kept[terms.name] = made.factors


def _make_svd(terms: Terms, rank: int | None) -> Made:
    if terms.is_dense:
        total, norm = terms.dense()
        if not norm:
            return Made(0, 0.0)
        best = best_of_dense(total, norm, rank)
        return Made(len(best.factors[0]), norm, best.error, best.excess, best.factors)
    lora_a, lora_b = terms.stack()
    bound = terms.bound((lora_a, lora_b))
    low = reduced(lora_b, lora_a, rank)
    norm = terms.real_norm(low.norm, bound)
    return Made(len(low.factors[0]), norm, low.error, 0.0, low.factors)


def _make_cat(terms: Terms, rank: int | None) -> Made:
    return Made(terms.stacked_rank, terms.norm())


def _make_linear(terms: Terms, rank: int | None) -> Made:
    """(sum c_i A_i) and scale * (sum c_i s_i B_i): with equal s_i, the paper's average."""
    if terms.is_dense:
        factors = _averaged_one_by_one(terms)
        total, norm = terms.dense()
        error = product_distance(total, factors)
        return Made(len(factors[0]), norm, error, factors=factors)
    lora_a, lora_b = terms.stack()
    bound = terms.bound((lora_a, lora_b))
    gram_b, gram_a = grams(lora_b, lora_a)
    exact = float((gram_b * gram_a).sum())
    norm = terms.real_norm(root_of(exact), bound)
    fold = np.tile(np.eye(terms.ranks[0]), len(terms.ranks))
    weighted = fold * np.concatenate(terms.coefficients)
    averaged = weighted.astype(np.float32) @ lora_a, lora_b @ fold.T.astype(np.float32)
    # |B (F' C - I) A|^2 with F = fold and C = weighted, from the Gram matrices alone.
    folded_b, weighted_a = fold @ gram_b, weighted @ gram_a
    crossed = float((folded_b * weighted_a).sum())
    own = float(((folded_b @ fold.T) * (weighted_a @ weighted.T)).sum())
    return Made(len(fold), norm, root_of(own - 2.0 * crossed + exact), factors=averaged)


def _averaged_one_by_one(terms: Terms) -> Factors:
    """The factors of `linear` where the stacked ones are too large to be kept."""
    n_out, n_in = terms.shape
    lora_a = np.zeros((terms.ranks[0], n_in), np.float32)
    lora_b = np.zeros((n_out, terms.ranks[0]), np.float32)
    for (pair, weight), coefficients in zip(terms.pairs(), terms.coefficients, strict=True):
        lora_a += coefficients.astype(np.float32)[:, None] * pair.lora_a
        lora_b += pair.lora_b * (weight * pair.scale).astype(np.float32)
    return lora_a, lora_b


COMBINATIONS: dict[str, Method] = {
    "svd": Method(_make_svd, takes_rank=True),
    "cat": Method(_make_cat, Terms.stack),
    "linear": Method(_make_linear, equal_ranks=True),
}


def _wanted_rank(method: str, rank: int | str) -> int | None:
    if rank == AUTO:
        return None
    if not isinstance(rank, int) or rank < 1:
        raise EdgeLoRAError(f"rank {rank!r}: a whole number from 1, or {AUTO}")
    if not COMBINATIONS[method].takes_rank:
        raise EdgeLoRAError(
            f"{method} takes no rank: it follows from the sources", hint="Use svd to choose a rank."
        )
    return rank


def _weights_of(
    names: Sequence[str], sources: Sequence[Source], coefficients: Coefficients, scale: float
) -> dict[str, NDArray[np.float64]]:
    """Checked coefficients for every tensor: (k,) or, for each component, (k, r)."""
    if isinstance(coefficients, Mapping):
        wrong = [f"{name}: no coefficients" for name in names if name not in coefficients]
        wrong += [f"{name}: no source adapts it" for name in coefficients if name not in names]
        by_name = {name: np.asarray(row, np.float64) for name, row in coefficients.items()}
    else:
        wrong = []
        by_name = dict.fromkeys(names, np.asarray(coefficients, np.float64))
    for name, row in by_name.items():
        rank = max((source.plan[name].rank for source in sources if name in source.plan), default=0)
        if len(row) != len(sources):
            wrong.append(f"{name}: {len(row)} coefficients for {len(sources)} adapters")
        elif row.ndim > 2 or (row.ndim == 2 and row.shape[1] < rank):
            wrong.append(f"{name}: coefficients of shape {row.shape} for adapters of rank {rank}")
        elif not np.isfinite(row).all():
            wrong.append(f"{name}: a coefficient is not a finite number")
    if not math.isfinite(scale):
        wrong.append(f"scale {scale} is not a finite number")
    if wrong:
        raise EdgeLoRAError("unusable coefficients", problems=wrong[:20])
    return by_name


def _refuse_mismatches(
    sources: Sequence[Source], weights: Mapping[str, NDArray[np.float64]], equal_ranks: bool
) -> None:
    shapes: list[str] = []
    ranks: list[str] = []
    for name, row in weights.items():
        used = [
            source.plan[name]
            for source, c in zip(sources, row, strict=True)
            if c.any() and name in source.plan
        ]
        if len({(p.n_out, p.n_in) for p in used}) > 1:
            sizes = sorted({f"{p.n_out} x {p.n_in}" for p in used})
            shapes.append(f"{name}: {' and '.join(sizes)}")
        if len({p.rank for p in used}) > 1:
            ranks.append(f"{name}: ranks {', '.join(str(p.rank) for p in used)}")
    if shapes:
        raise IncompatibleAdapter("the adapters are for different bases", problems=shapes[:20])
    if equal_ranks and ranks:
        raise UnsupportedFile(
            "linear averages the factors and needs equal ranks",
            problems=ranks[:20],
            hint="Use svd or cat, which are exact sums at any ranks.",
        )
