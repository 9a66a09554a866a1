"""What a person may choose about a build, what it says before it starts, and what it made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgelora.adapters.merge import MergeReport
from edgelora.operators.arbiter import Verdict

DEFAULT_BUDGET = 60_000
DEFAULT_DISTANCE = "bures"


@dataclass(frozen=True)
class Options:
    """What a person may choose; the defaults are the tool's own choice.

    Attributes:
        distance: a name of operators.distances.DISTANCES.
        operator: "auto" compares all candidates; a name writes that operator's combination, if it
            beats the base.
        budget_tokens: tokens that all forward passes together may compute.
        combine, rank, dtype: see adapters.merge.merge_adapters.
        exclude: glob patterns of adapter names to leave out.
        force: overwrite the output, and write the best candidate even if the base is better.
    """

    distance: str = DEFAULT_DISTANCE
    operator: str = "auto"
    budget_tokens: int = DEFAULT_BUDGET
    combine: str = "svd"
    rank: int | str = "auto"
    dtype: str = "f16"
    seed: int = 0
    exclude: tuple[str, ...] = ()
    force: bool = False


@dataclass(frozen=True)
class Plan:
    """What a build is about to do, told before the long part.

    Attributes:
        n_measured: adapters whose loss is measured, of the `n_adapters` that fit the base.
        n_shown: support examples that each of them is measured on (the shortest).
        n_tokens: estimate of all tokens that the build computes.
        tokens_per_s: speed of the base's own pass a moment ago; NaN where there is none.
    """

    n_support: int
    n_selection: int
    n_untouched: int
    n_adapters: int
    n_measured: int
    n_shown: int
    n_tokens: int
    budget_tokens: int
    tokens_per_s: float

    @property
    def seconds(self) -> float:
        """The estimate converted; NaN where the speed is not known."""
        return self.n_tokens / self.tokens_per_s


@dataclass(frozen=True)
class Judgement:
    """The last comparison: the finished file, loaded, against the base; nats a token.

    Attributes:
        part: "untouched", or "selection part, optimistic" with fewer than 24 examples.
        interval: 95 % paired bootstrap of adapter - base, (low, mid, high).
    """

    part: str
    n_examples: int
    base_loss: float
    adapter_loss: float
    interval: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Built:
    """What was written, and why.

    Attributes:
        chosen: the candidate that was written.
        coefficients: by adapter, the global scale included; zeros left out.
        distances: by adapter, of those that have a signature.
        losses_alone: by adapter, its support loss alone.
        support_losses: by candidate, at its best scale, on the support examples shown.
        verdict: of the selection part; None where nothing could be measured.
        judgement: None where nothing could be measured.
    """

    out: Path
    chosen: str
    coefficients: dict[str, float]
    distances: dict[str, float]
    losses_alone: dict[str, float]
    support_losses: dict[str, float]
    verdict: Verdict | None
    judgement: Judgement | None
    merge: MergeReport
    n_tokens: int
    elapsed_s: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Listener:
    """Told what a build does; the command line draws it.

    Attributes:
        plan: the plan, once.
        progress: (stage, steps done, steps in all).
        warn: each warning, as it arises.
    """

    plan: Callable[[Plan], None] = lambda plan: None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    warn: Callable[[str], None] = lambda message: None
