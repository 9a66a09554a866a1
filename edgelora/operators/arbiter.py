"""The arbiter: candidates and their losses on examples that nothing else saw, to the one to write.

The rule, in two steps:

1. A candidate is eligible if it beats the base by more than the noise: its mean loss a token is
   lower, and the paired difference to the base exceeds `margin` (1) of its standard errors, about
   84 % one-sided.
2. The eligible candidate of least loss wins. An earlier one (candidates come simplest first) is
   taken in its place only if the two are all but tied: the paired difference between them is at
   most `tie` (0.25) of its own standard error.

Without an eligible candidate nothing is chosen: the base stays as it is.

Where examples are too few to keep some apart, the losses are cross-validated (Stone, 1974): each
example's is that of the coefficients that were found without its fold. The rule is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

MARGIN = 1.0
TIE = 0.25
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to combine the bank.

    Attributes:
        name: what a person is shown, e.g. "uniform mean x 2".
        coefficients: (k,) float64 by adapter.
        scale: a global factor on top of them.
    """

    name: str
    coefficients: Array
    scale: float = 1.0


@dataclass(frozen=True)
class Row:
    """How one candidate did.

    Attributes:
        name: the candidate's.
        loss: mean nats a token.
        difference: its loss minus the base's; negative is better.
        standard_error: of the difference, paired by example; NaN with fewer than 2 examples.
        eligible: whether it beat the base by more than the noise.
    """

    name: str
    loss: float
    difference: float
    standard_error: float
    eligible: bool


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the arbiter decided.

    Attributes:
        chosen: the candidate to write, or None: the base is better or as good.
        position: its place among the candidates, or None.
        base_loss: the base's mean nats a token.
        table: a row for each candidate, in their order.
        reasons: the decision in words, one sentence each.
    """

    chosen: Candidate | None
    position: int | None
    base_loss: float
    table: tuple[Row, ...]
    reasons: tuple[str, ...]


def choose(
    candidates: Sequence[Candidate],
    nll: ArrayLike,
    n_tokens: ArrayLike,
    base_nll: ArrayLike,
    *,
    margin: float = MARGIN,
    tie: float = TIE,
) -> Verdict:
    """Choose among candidates by their measured losses; see the module's rule.

    Args:
        candidates: simplest first.
        nll: (c, n) summed negative log-likelihood of each example's completion, nats.
        n_tokens: (n,) tokens summed over, each at least 1.
        base_nll: (n,) the same for the base alone.
        margin: standard errors by which the base must be beaten.
        tie: standard errors within which the simpler candidate is preferred.

    Raises:
        ValueError: shapes that do not fit, no example, an example without tokens, or a loss of the
            base that is not finite.

    Example:
        >>> one = Candidate("mean", np.array([0.5, 0.5]))
        >>> choose([one], [[1.0, 2.0, 1.0]], [1, 1, 1], [3.0, 4.0, 3.5]).chosen.name
        'mean'
    """
    losses, tokens, base = _checked(candidates, nll, n_tokens, base_nll)
    base_loss = float(base.sum() / tokens.sum())
    rows = tuple(
        _row(candidate.name, loss, base, tokens, margin)
        for candidate, loss in zip(candidates, losses, strict=True)
    )
    reasons = [_row_reason(row, margin) for row in rows if not row.eligible]
    eligible = [i for i, row in enumerate(rows) if row.eligible]
    if not eligible:
        reasons.append("no candidate beats the base by more than the noise: the base stays")
        return Verdict(None, None, base_loss, rows, tuple(reasons))
    best = min(eligible, key=lambda i: rows[i].loss)
    position = next(i for i in eligible if _tied(losses[i], losses[best], tokens, tie))
    if position != best:
        reasons.append(
            f"{rows[best].name} has the least loss, but {rows[position].name} is simpler and "
            f"within {tie:g} standard errors of it"
        )
    row = rows[position]
    reasons.append(
        f"{row.name}: {row.loss:.4f} nats a token against the base's {base_loss:.4f}, better by "
        f"{-row.difference:.4f} with a standard error of {row.standard_error:.4f}"
    )
    return Verdict(candidates[position], position, base_loss, rows, tuple(reasons))


def paired_difference(nll: Array, reference: Array, n_tokens: Array) -> tuple[float, float]:
    """Difference in mean nats a token and its standard error, paired by example.

    The error is that of a ratio of sums over examples (Cochran, 1977, equation 2.39, for an
    infinite population); NaN with a single example.

    Args:
        nll, reference, n_tokens: (n,) float64.
    """
    gaps = nll - reference
    total = float(n_tokens.sum())
    difference = float(gaps.sum()) / total
    n = len(gaps)
    if n < 2:
        return difference, math.nan
    deviations = gaps - difference * n_tokens
    return difference, math.sqrt(float((deviations**2).sum()) * n / (n - 1)) / total


def _row(name: str, nll: Array, base: Array, tokens: Array, margin: float) -> Row:
    if not np.isfinite(nll).all():
        return Row(name, math.inf, math.inf, math.nan, eligible=False)
    difference, error = paired_difference(nll, base, tokens)
    # A NaN error (one example) compares false: a single example proves nothing.
    eligible = difference < 0 and -difference > margin * error
    return Row(name, float(nll.sum() / tokens.sum()), difference, error, eligible)


def _tied(nll: Array, best: Array, tokens: Array, tie: float) -> bool:
    difference, error = paired_difference(nll, best, tokens)
    return difference <= tie * error


def _row_reason(row: Row, margin: float) -> str:
    if math.isinf(row.loss):
        return f"{row.name}: its loss is not finite"
    if row.difference >= 0:
        return f"{row.name}: no better than the base ({row.difference:+.4f} nats a token)"
    if math.isnan(row.standard_error):
        return f"{row.name}: a single example cannot show that it is better"
    return (
        f"{row.name}: better than the base by {-row.difference:.4f} nats a token, which is within "
        f"the noise ({margin:g} x {row.standard_error:.4f})"
    )


def _checked(
    candidates: Sequence[Candidate], nll: ArrayLike, n_tokens: ArrayLike, base_nll: ArrayLike
) -> tuple[Array, Array, Array]:
    tokens, base = np.asarray(n_tokens, np.float64), np.asarray(base_nll, np.float64)
    losses = np.asarray(nll, np.float64)
    if tokens.ndim != 1 or not len(tokens) or base.shape != tokens.shape:
        raise ValueError(f"{base.shape} losses of the base and {tokens.shape} token counts")
    if len(candidates) and losses.shape != (len(candidates), len(tokens)):
        raise ValueError(
            f"losses of shape {losses.shape} for {len(candidates)} candidates and "
            f"{len(tokens)} examples"
        )
    if (tokens < 1).any() or not np.isfinite(base).all():
        raise ValueError("an example without tokens, or a loss of the base that is not finite")
    return losses, tokens, base
