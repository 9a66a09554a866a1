"""LoraHub (arXiv:2307.13269) by its public code: 20 random adapters, 40 steps, an L1 penalty.

As in lorahub/algorithm.py of sail-sg/lorahub: coefficients in [-1.5, 1.5] from 0, NGOpt of
nevergrad, factors averaged apart, and an objective of (loss of all examples in one batch, nats a
token) / (number of examples) + 0.05 mean |w|. The division is the code's: the penalty weighs more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.adapters.merge import merge_adapters
from edgelora.engine.context import open_context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import count_tokens, mean_loss, score
from edgelora.errors import EdgeLoRAError
from operators_benchmark.bench import Bench, Made

BOUND = 1.5
PENALTY = 0.05
Array = NDArray[np.float64]


def make_lorahub(
    bench: Bench, *, n_adapters: int = 20, n_steps: int = 40, combine: str = "linear"
) -> Made:
    """What LoraHub finds.

    Args:
        combine: "linear" as in its code; "exact" sums the updates themselves, in the search too.

    Raises:
        EdgeLoRAError: nevergrad is not installed.
    """
    draw = random.Random(f"{bench.case.seed} {bench.case.task} lorahub")
    chosen = draw.sample(range(bench.k), min(n_adapters, bench.k))
    files = [bench.case.adapters[i] for i in chosen]
    measure = _linear(bench, files) if combine == "linear" else _exact(bench, files)
    found = minimise(measure, len(files), len(bench.texts), n_steps, seed=bench.case.seed)
    return bench.combined(bench.pool.spread(chosen, found), combine=combine)


def minimise(
    loss: Callable[[Array], float], k: int, n_examples: int, n_steps: int, *, seed: int
) -> Array:
    """Coefficients (k,) by NGOpt with LoraHub's bounds, start and objective.

    Args:
        loss: nats a token of coefficients (k,).
    """
    nevergrad = find_nevergrad()
    variables = nevergrad.p.Array(init=[0.0] * k, lower=[-BOUND] * k, upper=[BOUND] * k)
    variables.random_state = np.random.RandomState(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=variables, budget=n_steps)

    def objective(w: Array) -> float:
        return loss(w) / n_examples + PENALTY * float(np.abs(w).mean())

    return np.asarray(optimizer.minimize(objective).value, np.float64)


def _linear(bench: Bench, files: Sequence[LoraFile]) -> Callable[[Array], float]:
    """The loss under averaged factors, each time a file."""
    path = bench.new_folder() / "lorahub.gguf"

    def loss(w: Array) -> float:
        if not np.any(w):
            return bench.support_loss([])
        merge_adapters(files, w.tolist(), path, method="linear", force=True)
        found = bench.support_loss([WeightedAdapter(path)])
        bench.context.model.unload(path)
        return found

    return loss


def _exact(bench: Bench, files: Sequence[LoraFile]) -> Callable[[Array], float]:
    """The loss under all adapters at once, each with its coefficient."""
    model = bench.case.bed.model

    def loss(w: Array) -> float:
        bench.meter.spend(count_tokens(bench.texts))
        for file in files:
            model.adapter(file.path)  # a context has room for what is loaded before it is made
        with open_context(model, n_ctx=bench.context.n_ctx) as context:
            context.apply([WeightedAdapter(f.path, c) for f, c in zip(files, w, strict=True)])
            found = mean_loss(score(context, bench.texts))
        for file in files:
            model.unload(file.path)
        return found

    return loss


def find_nevergrad() -> Any:
    """The package.

    Raises:
        EdgeLoRAError: it is not installed.
    """
    try:
        import nevergrad
    except ImportError as error:
        raise EdgeLoRAError(
            f"LoraHub's search is nevergrad's, which is not installed ({error})",
            hint='Install it with: pip install "edgelora[bench]", or leave the lorahub arms out.',
        ) from error
    return nevergrad
