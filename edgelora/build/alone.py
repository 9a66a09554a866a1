"""What forward passes of single adapters tell: the states before the head, and losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.build.pool import Pool
from edgelora.engine.context import Context
from edgelora.engine.hidden import CompletionStates, completion_states, head_matrix
from edgelora.engine.model import Model, WeightedAdapter
from edgelora.engine.score import TokenisedExample, count_tokens
from edgelora.gguf_file import open_gguf
from edgelora.gradient.weights import Weights
from edgelora.operators.surrogate import Head, Mask, States, WholeHead, token_losses
from edgelora.scratch import mapped_array

Array = NDArray[np.float64]
# With low_ram, states that take more lie in a mapped file.
_IN_MEMORY_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class Measured:
    """What forward passes of single adapters told.

    Attributes:
        positions: of the m adapters measured, in the pool.
        by_token: (m, t) nats of each completion token under each adapter alone.
        base: the states that predict the completions, without any adapter.
        slopes: (m, t, d), the states with each adapter alone less these.
        seen: (t,) the tokens that count.
    """

    positions: list[int]
    by_token: Array
    base: CompletionStates
    slopes: States
    head: Head
    seen: Mask

    @property
    def losses(self) -> Array:
        """(m,) mean nats a token of each alone."""
        return np.asarray(self.by_token[:, self.seen].mean(axis=1))


class MappedHead:
    """The head of a base, from its mapped file: a few rows are in float at a time."""

    def __init__(self, model: Model) -> None:
        self._name = model.base.head
        self._weights = Weights(open_gguf(model.base.path), n_threads=model.options.threads())

    def tiles(self) -> Iterator[tuple[int, States]]:
        """See Head."""
        return self._weights.tiles(self._name)


def open_head(model: Model) -> Head:
    """In memory, but with low_ram: at 7B it takes 0.5 GB in float32."""
    return MappedHead(model) if model.options.low_ram else WholeHead(head_matrix(model))


def measure_base(
    context: Context, shown: Sequence[TokenisedExample]
) -> tuple[CompletionStates, float]:
    """The base's own pass, and its speed in tokens a second."""
    context.apply([])
    started = time.perf_counter()
    base = completion_states(context, shown)
    return base, count_tokens(shown) / (time.perf_counter() - started)


def measure_alone(
    context: Context,
    paths: Sequence[Path],
    shown: Sequence[TokenisedExample],
    progress: Callable[[int, int], None],
    *,
    at: Sequence[WeightedAdapter] = (),
    weight: float = 1.0,
    planned: Callable[[float], None] = lambda tokens_per_s: None,
) -> Iterator[CompletionStates]:
    """One pass for each adapter, each loaded for its own pass only.

    Args:
        context: opened with `hidden=True`.
        progress: (adapters done, adapters in all).
        at: what is applied beside each, at `weight`.
        planned: told the speed of the faster of the first two, in tokens a second.
    """
    speeds = []
    for done, path in enumerate(paths):
        progress(done, len(paths))
        started = time.perf_counter()
        context.apply([*at, WeightedAdapter(path, weight)])
        states = completion_states(context, shown)
        speeds.append(count_tokens(shown) / (time.perf_counter() - started))
        if done == min(1, len(paths) - 1):
            planned(max(speeds))
        context.apply([])
        context.model.unload(path)
        yield states
    progress(len(paths), len(paths))


def measure_slopes(
    context: Context,
    paths: Sequence[Path],
    shown: Sequence[TokenisedExample],
    here: CompletionStates,
    progress: Callable[[int, int], None],
    *,
    at: Sequence[WeightedAdapter] = (),
    weight: float = 1.0,
    planned: Callable[[float], None] = lambda tokens_per_s: None,
    folder: Path | None = None,
) -> States:
    """(m, t, d): how states change along each adapter, for a coefficient of one.

    Args:
        here: the states with `at` alone.
        folder: for what is large, with low_ram; see mapped_array.
        others: see `measure_alone`.
    """
    shape = (len(paths), *here.hidden.shape)
    is_mapped = context.model.options.low_ram and 4 * np.prod(shape) > _IN_MEMORY_BYTES
    slopes = mapped_array(shape, folder=folder) if is_mapped else np.empty(shape, np.float32)
    alone = measure_alone(context, paths, shown, progress, at=at, weight=weight, planned=planned)
    for i, states in enumerate(alone):
        np.subtract(states.hidden, here.hidden, out=slopes[i])
        slopes[i] /= np.float32(weight)
    return slopes


def measure_adapters(
    context: Context,
    pool: Pool,
    positions: list[int],
    shown: Sequence[TokenisedExample],
    *,
    planned: Callable[[float], None] = lambda tokens_per_s: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    folder: Path | None = None,
) -> Measured:
    """One pass for the base, and one for each of some adapters alone.

    Args:
        context: opened with `hidden=True`.
        planned: told the speed, in tokens a second, of the first adapters (of the base, without
            any) before the others begin.
        folder: see `measure_slopes`.
    """
    base, tokens_per_s = measure_base(context, shown)
    slopes = measure_slopes(
        context, [pool.paths[i] for i in positions], shown, base, progress,
        planned=planned, folder=folder,
    )  # fmt: skip
    if not positions:
        planned(tokens_per_s)
    head = open_head(context.model)
    rows = [token_losses(base.hidden + slope, base.targets, head) for slope in slopes]
    by_token = np.stack(rows) if rows else np.zeros((0, len(base.targets)))
    return Measured(positions, by_token, base, slopes, head, np.ones(len(base.targets), bool))
