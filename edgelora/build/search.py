"""What a search by forward passes works with, and how it lets go of the files that it tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.build.alone import Measured
from edgelora.build.crossing import owners_of
from edgelora.build.pool import Pool
from edgelora.build.proposals import Nearness, needs_losses
from edgelora.build.records import Options
from edgelora.build.trials import Budget, Trial, make_trial
from edgelora.engine.context import Context
from edgelora.engine.model import Model
from edgelora.engine.score import TokenisedExample
from edgelora.operators.searches import MAX_MEASURED

Array = NDArray[np.float64]
N_LINEARISATIONS = 3


@dataclass(frozen=True, eq=False)
class Search:
    """What a search by forward passes works with.

    Attributes:
        examples: that it learns from, the shortest first.
        nearness: None without signatures.  measured: None if no adapter was measured alone.
        folder: for the files of trials.
        n_linearisations: of the surrogate, at most; the one at the base is among them.
        n_spared: tokens that are left for the comparison of one candidate more.
        folds: (n,) the fold of each example, where candidates are cross-validated.
        progress: (stage, steps done, steps in all).
    """

    model: Model
    pool: Pool
    examples: Sequence[TokenisedExample]
    nearness: Nearness | None
    measured: Measured | None
    folder: Path
    budget: Budget
    n_linearisations: int = N_LINEARISATIONS
    seed: int = 0
    n_spared: int = 0
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    folds: NDArray[np.int64] | None = None

    @property
    def examples_left_out(self) -> list[NDArray[np.bool_]]:
        """The examples (n,) of each fold; [] without folds."""
        return [] if self.folds is None else [self.folds == f for f in np.unique(self.folds)]

    @property
    def left_out(self) -> list[NDArray[np.bool_]]:
        """The completion tokens (t,) of each fold; [] without folds."""
        owners = owners_of(self.examples)
        return [examples[owners] for examples in self.examples_left_out]

    def make(self, name: str, coefficients: Array) -> Trial:
        """Coefficients (k,) as a trial with its file."""
        return make_trial(
            name,
            coefficients,
            self.pool.paths,
            self.folder,
            hashes=self.pool.hashes,
            progress=self.progress,
        )


def count_search_passes(options: Options, n_adapters: int) -> int:
    """Passes over the examples that a search takes beside its candidates', at most."""
    if options.operator in ("coordinate", "cma"):
        return MAX_MEASURED
    if options.operator == "relinearised" or (options.operator == "auto" and needs_losses(options)):
        return (N_LINEARISATIONS - 1) * (1 + n_adapters)
    return n_adapters if options.operator == "halving" else 0


def release(context: Context, *paths: Path) -> None:
    """Let go of files: what is loaded takes memory, and cannot be deleted everywhere."""
    context.apply([])
    for path in paths:
        context.model.unload(path)
