"""The paper's own measures: first reference only, ROUGE with stemmer, plain matches, weight MSE.

As in src/evaluation of its public code: subsequence match asks whether the reference stands in the
answer, and the MSE runs over the flattened A and B of all tensors, which is defined where a file
has the ranks of the task's own adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from edgelora.adapters.gguf_lora import LoraFile, open_lora
from edgelora.adapters.lora import stacked
from edgelora.adapters.lowrank import product_norm
from edgelora.engine.model import WeightedAdapter


def answer_measures(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means over answers against one reference each: subsequence, rouge_l, rouge_lsum.

    Example:
        >>> found = answer_measures(["the cat sat", "no"], ["cat", "no"])
        >>> found["subsequence"], round(found["rouge_l"], 2)
        (1.0, 0.75)
    """
    pairs = list(zip(answers, references, strict=True))
    rouge = [_scorer().score(reference, answer) for answer, reference in pairs]
    columns = {
        "subsequence": [reference in answer for answer, reference in pairs],
        "rouge_l": [found["rougeL"].fmeasure for found in rouge],
        "rouge_lsum": [found["rougeLsum"].fmeasure for found in rouge],
    }
    return {name: round(float(np.mean(values)), 4) for name, values in columns.items()}


def weight_errors(
    adapters: Sequence[WeightedAdapter], own: LoraFile, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float | None]:
    """Mean squared errors to the own adapter, of the factors and of the updates that they make.

    Args:
        adapters: none (the base) or one; of several nothing is told.
        shapes: (out, in) of the base's tensors.

    Returns:
        mse_factors: over all entries of A and B as they are stored; None where ranks differ.
        mse_updates: over all entries of the updated matrices, scales included.
    """
    if len(adapters) > 1:
        return {"mse_factors": None, "mse_updates": None}
    made = open_lora(adapters[0].path) if adapters else None
    weight = adapters[0].weight if adapters else 0.0
    return {
        "mse_factors": _factors_error(made, own),
        "mse_updates": _updates_error(made, weight, own, shapes),
    }


def _factors_error(made: LoraFile | None, own: LoraFile) -> float | None:
    if made is not None and (made.plan != own.plan):
        return None
    total, n = 0.0, 0
    for name in own.names:
        pair = own.pair(name)
        other = made.pair(name) if made is not None else None
        for key in ("lora_a", "lora_b"):
            mine = np.asarray(getattr(pair, key), np.float64)
            theirs = np.asarray(getattr(other, key), np.float64) if other else 0.0
            total += float(((mine - theirs) ** 2).sum())
            n += mine.size
    return _digits(total / n)


def _updates_error(
    made: LoraFile | None, weight: float, own: LoraFile, shapes: Mapping[str, tuple[int, ...]]
) -> float:
    """||made - own||^2 of each tensor from the factors of both, never the matrices."""
    names = set(own.names) | set(made.names if made is not None else ())
    total = 0.0
    for name in names:
        pairs, scales = [], []
        for file, sign in ((own, -1.0), (made, weight)):
            if file is not None and name in file.plan:
                pairs.append(file.pair(name))
                scales += [sign * pairs[-1].scale] * pairs[-1].rank
        lora_a, lora_b = stacked(pairs)
        total += product_norm(lora_b * np.array(scales, np.float32), lora_a) ** 2
    return _digits(total / sum(math.prod(shapes[name]) for name in names))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL", "rougeLsum"], use_stemmer=True)
