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

from edgelora.adapters.lora import LoraPair, for_components, stacked
from edgelora.adapters.lora_layout import PairPlan
from edgelora.adapters.lowrank import (
    Factors,
    Float32,
    product_norm,
    rank_for,
    singular_values,
    truncated,
)
from edgelora.errors import EdgeLoRAError, IncompatibleAdapter, InvalidFile, UnsupportedFile

# One for each adapter; or for each tensor's name one for each adapter, (k,), or one for each
# rank-one component of each adapter, (k, r), padded to the largest rank.
Coefficients = Sequence[float] | Mapping[str, ArrayLike]

AUTO = "auto"
# float32 factors: an update this small beside its factors is what cancelling left over.
CANCELLED = 1e-6
MAX_FACTOR = 1e15  # beyond it float32 squares and their sums overflow


class Source(Protocol):
    """An adapter that can be combined; gguf_lora.LoraFile is one."""

    @property
    def plan(self) -> Mapping[str, PairPlan]:
        """Names and sizes of its updates."""

    def pair(self, name: str) -> LoraPair:
        """One update."""


@dataclass(frozen=True)
class Stack:
    """The exact combination of one tensor as one pair of stacked factors.

    Attributes:
        lora_a: (R, in) float32, every A_i below the other; R is the sum of the ranks.
        lora_b: (out, R) float32, every scale * c_i * s_i * B_i beside the other.
        coefficients: the c_i that are not zero, (r_i,) each; ranks: the r_i that belong to them.
    """

    lora_a: Float32
    lora_b: Float32
    coefficients: tuple[NDArray[np.float64], ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class TensorReport:
    """What combining did to one tensor.

    Attributes:
        rank: of the update that was made; stacked_rank: the sum of the sources' ranks.
        norm: Frobenius norm of the exact combination.
        error: Frobenius norm of (made - exact) divided by `norm`.
    """

    name: str
    rank: int
    stacked_rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class Combination:
    """A planned combination: sizes and errors are known, values are made by `pairs`.

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
        total = math.fsum(report.norm**2 for report in self.reports)
        lost = math.fsum((report.error * report.norm) ** 2 for report in self.reports)
        return math.sqrt(lost / total)

    def pairs(self) -> Iterator[LoraPair]:
        """The combined updates (float32, scale 1) in the plan's order, one alive at a time."""
        return (self._make(planned) for planned in self.plan)


@dataclass(frozen=True)
class Method:
    """One way to combine: `measure` gives rank and error, `factors` the values of that rank."""

    measure: Callable[[Stack, int | None], tuple[int, float]]
    factors: Callable[[Stack, int], Factors]
    takes_rank: bool = False
    equal_ranks: bool = False


def combine(
    method: str,
    sources: Sequence[Source],
    coefficients: Coefficients,
    *,
    rank: int | str = AUTO,
    scale: float = 1.0,
    progress: Callable[[int], None] = lambda n_tensors: None,
) -> Combination:
    """Plan the combination `sum_i scale * c_i * (update of source i)` and measure its error.

    Args:
        method: a key of COMBINATIONS.
        coefficients: one for each source, or a mapping from every tensor's name to such a list,
            or to a matrix with one for each rank-one component of each source (see Coefficients).
            Zeros are dropped. A tensor that a source does not adapt gets nothing from it.
        rank: of the result, for svd: a number, or "auto" for 99 % of the energy with at most 64.
            A tensor whose exact combination has a smaller rank gets that.
        scale: multiplies every coefficient.
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
    plan, reports, cancelled = [], [], []
    for name in names:
        stack = _stack(name, sources, weights[name], scale)
        norm = _norm_or_zero(name, stack)
        if norm:
            made, error = way.measure(stack, wanted)
            plan.append(PairPlan(name, made, stack.lora_a.shape[1], stack.lora_b.shape[0]))
            reports.append(TensorReport(name, made, sum(stack.ranks), norm, error / norm))
        elif stack.ranks:
            cancelled.append(name)
        progress(1)
    if not plan:
        raise EdgeLoRAError(
            "the combined adapter is zero everywhere", hint="Choose other coefficients."
        )

    def make(planned: PairPlan) -> LoraPair:
        stack = _stack(planned.name, sources, weights[planned.name], scale)
        lora_a, lora_b = way.factors(stack, planned.rank)
        return LoraPair(planned.name, lora_a, lora_b, 1.0)

    return Combination(tuple(plan), tuple(reports), tuple(cancelled), make)


def _measure_svd(stack: Stack, rank: int | None) -> tuple[int, float]:
    values = singular_values(stack.lora_b, stack.lora_a)
    kept = rank_for(values, rank)
    return kept, float(np.linalg.norm(values[kept:]))


def _factors_svd(stack: Stack, rank: int) -> Factors:
    return truncated(stack.lora_b, stack.lora_a, rank)


def _measure_cat(stack: Stack, rank: int | None) -> tuple[int, float]:
    return sum(stack.ranks), 0.0


def _factors_cat(stack: Stack, rank: int) -> Factors:
    return stack.lora_a, stack.lora_b


def _measure_linear(stack: Stack, rank: int | None) -> tuple[int, float]:
    lora_a, lora_b = _factors_linear(stack, stack.ranks[0])
    difference_b = np.concatenate([lora_b, -stack.lora_b], axis=1)
    difference_a = np.concatenate([lora_a, stack.lora_a])
    return stack.ranks[0], product_norm(difference_b, difference_a)


def _factors_linear(stack: Stack, rank: int) -> Factors:
    """(sum c_i A_i) and scale * (sum c_i s_i B_i): with equal s_i, the paper's average."""
    weights = np.array(stack.coefficients, dtype=np.float32)[:, :, None]
    lora_a = (weights * stack.lora_a.reshape(len(stack.ranks), rank, -1)).sum(axis=0)
    lora_b = stack.lora_b.reshape(stack.lora_b.shape[0], len(stack.ranks), rank).sum(axis=1)
    return lora_a, lora_b


COMBINATIONS: dict[str, Method] = {
    "svd": Method(_measure_svd, _factors_svd, takes_rank=True),
    "cat": Method(_measure_cat, _factors_cat),
    "linear": Method(_measure_linear, _factors_linear, equal_ranks=True),
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


def _stack(
    name: str, sources: Sequence[Source], weights: NDArray[np.float64], scale: float
) -> Stack:
    """The stacked factors of one tensor; empty where every weight is zero."""
    pairs = [
        (weight, source.pair(name))
        for source, weight in zip(sources, weights, strict=True)
        if (weight * scale).any() and name in source.plan
    ]
    if not pairs:
        return Stack(np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32), (), ())
    coefficients = tuple(for_components(weight, pair.rank) for weight, pair in pairs)
    factors = [scale * c * pair.scale for c, (_, pair) in zip(coefficients, pairs, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused by the norm
        lora_a, lora_b = stacked([pair for _, pair in pairs])
        lora_b *= np.concatenate(factors).astype(np.float32)
    return Stack(lora_a, lora_b, coefficients, tuple(pair.rank for _, pair in pairs))


def _norm_or_zero(name: str, stack: Stack) -> float:
    """The exact combination's norm; 0 where it is only what cancelling left over."""
    if not stack.ranks:
        return 0.0
    sizes = [float(np.abs(factor).max()) for factor in (stack.lora_b, stack.lora_a)]
    if not all(map(math.isfinite, sizes)):
        raise InvalidFile(f"{name}: an adapter holds NaN or infinite values")
    if max(sizes) > MAX_FACTOR:
        raise InvalidFile(f"{name}: an adapter holds a factor of {max(sizes):.1e}, too large")
    norm = product_norm(stack.lora_b, stack.lora_a)
    bound = float(np.linalg.norm(stack.lora_b)) * float(np.linalg.norm(stack.lora_a))
    return norm if norm > CANCELLED * bound else 0.0
