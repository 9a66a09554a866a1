"""Distances (or losses) to coefficients on the simplex: the paper's heads and plain baselines.

Every operator takes k costs, lower being better, and returns k float64 coefficients that are not
negative and sum to 1. A cost of +inf gets coefficient 0. `temperature=None` means calibrated; the
paper has none, which is temperature 1 (`PAPER_TEMPERATURE`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelora.operators.neural import NeuralHead

Array = NDArray[np.float64]
Operator = Callable[..., Array]
PAPER_TEMPERATURE = 1.0
_TINY = 1e-300


def softmin(costs: ArrayLike, temperature: float) -> Array:
    """exp(-costs / temperature), normalised; safe for any positive temperature.

    It minimises <w, costs> + temperature * sum w log w on the simplex (the paper's theory).

    Raises:
        ValueError: no cost is finite, a cost is NaN or -inf, or the temperature is not positive.

    Example:
        >>> softmin([0.0, math.log(3.0)], 1.0).round(3).tolist()
        [0.75, 0.25]
    """
    costs = _checked(costs)
    if not temperature > 0:
        raise ValueError(f"a temperature must be positive, not {temperature}")
    weights = np.exp(-(costs - costs.min()) / max(temperature, _TINY))
    return np.asarray(weights / weights.sum(), np.float64)


def calibrated_temperature(costs: ArrayLike, effective: float | None = None) -> float:
    """The temperature at which softmin spreads over `effective` adapters, exp(entropy) of them.

    Args:
        costs: (k,) with at least one finite value.
        effective: between 1 and the number of finite costs; half of them by default. Broad mixtures
            are the safer start: in a probe on SmolLM2 (4 tasks, 15 adapters) the uniform mean
            recovered 0.69 of the loss and the nearest adapter alone 0.34, one task harmed.

    Returns:
        The temperature; 1 where all finite costs are equal and every temperature does the same.
    """
    costs = _checked(costs)
    finite = costs[np.isfinite(costs)]
    spread = float(finite.max() - finite.min())
    if spread == 0.0:
        return 1.0
    wanted = min(max(effective or len(finite) / 2, 1.0), len(finite))
    low, high = math.log(spread) - 30.0, math.log(spread) + 30.0
    for _ in range(80):
        middle = (low + high) / 2
        if _perplexity(softmin(finite, math.exp(middle))) < wanted:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def attentional(distances: ArrayLike, *, temperature: float | None = None) -> Array:
    """The paper's first head: softmin(distances / temperature)."""
    chosen = calibrated_temperature(distances) if temperature is None else temperature
    return softmin(distances, chosen)


def normalized(
    distances: ArrayLike, *, temperature: float | None = None, diagonal: bool = True
) -> Array:
    """The paper's second head: softmin of z-scores, which are free of units.

    Args:
        temperature: 1 by default, the paper's: z-scores are calibrated already.
        diagonal: whether the dataset's distance 0 to itself counts in mean and deviation, as it
            does in the paper's code; `normalized_fixed` leaves it out.
    """
    chosen = PAPER_TEMPERATURE if temperature is None else temperature
    return softmin(z_scores(distances, diagonal=diagonal), chosen)


def neural(distances: ArrayLike, *, head: NeuralHead, temperature: float | None = None) -> Array:
    """The paper's third head: softmin(MLP(z-score)), the MLP trained for this bank.

    Args:
        head: from the bank's `neural.safetensors`, trained for one distance.
        temperature: 1 by default: the one that the head was trained with.
    """
    chosen = PAPER_TEMPERATURE if temperature is None else temperature
    costs = _checked(distances)
    scores = np.full(len(costs), np.inf)
    finite = np.isfinite(costs)
    scores[finite] = head(z_scores(costs, diagonal=head.diagonal)[finite])
    return softmin(scores, chosen)


def uniform(distances: ArrayLike) -> Array:
    """The same coefficient for every adapter (whose cost is finite)."""
    finite = np.isfinite(_checked(distances))
    return np.asarray(finite / finite.sum(), np.float64)


def nearest(distances: ArrayLike) -> Array:
    """The adapter of the least cost alone; the first of equals."""
    return top_k(distances, count=1)


def top_k(distances: ArrayLike, *, count: int = 3, temperature: float | None = None) -> Array:
    """The `count` adapters of least cost: equally without a temperature, else by softmin."""
    costs = _checked(distances)
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    chosen = np.argsort(costs, kind="stable")[:count]
    kept = np.full(len(costs), np.inf)
    kept[chosen] = costs[chosen]
    return uniform(kept) if temperature is None else softmin(kept, temperature)


def gibbs(losses: ArrayLike, *, temperature: float | None = None) -> Array:
    """w_i proportional to exp(-L_i / temperature), L_i the measured loss of adapter i.

    Args:
        losses: (k,) mean nats a token of each adapter on the user's support examples.
        temperature: by default a quarter of the gap between the median and the least loss: the
            better half shares nearly all of the weight, whatever the unit or a few failures.
    """
    if temperature is not None:
        return softmin(losses, temperature)
    costs = _checked(losses)
    finite = costs[np.isfinite(costs)]
    gap = float(np.median(finite) - finite.min())
    return (
        softmin(costs, gap / 4)
        if gap > 0
        else top_k(costs, count=int((costs == costs.min()).sum()))
    )


def z_scores(distances: ArrayLike, *, diagonal: bool) -> Array:
    """(distances - mean) / population deviation, of the finite ones (and a 0, the diagonal)."""
    costs = _checked(distances)
    finite = costs[np.isfinite(costs)]
    counted = np.append(finite, 0.0) if diagonal else finite
    deviation = float(counted.std())
    # Equal distances may leave a rounding error as deviation; scikit-learn's scaler uses 1 there.
    tiny = 10 * np.finfo(np.float64).eps * float(np.abs(counted).max())
    return np.asarray((costs - counted.mean()) / (deviation if deviation > tiny else 1.0))


OPERATORS: dict[str, Operator] = {
    "attentional": attentional,
    "normalized": normalized,
    "normalized_fixed": partial(normalized, diagonal=False),
    "neural": neural,
    "uniform": uniform,
    "nearest": nearest,
    "topk": top_k,
    "gibbs": gibbs,
}


def _checked(costs: ArrayLike) -> Array:
    array = np.asarray(costs, np.float64)
    if array.ndim != 1 or not np.isfinite(array).any():
        raise ValueError(f"costs of shape {array.shape} without a finite value")
    if np.isnan(array).any() or np.isneginf(array).any():
        raise ValueError("a cost is NaN or -inf")
    return array


def _perplexity(weights: Array) -> float:
    positive = weights[weights > 0]
    return math.exp(-float((positive * np.log(positive)).sum()))
