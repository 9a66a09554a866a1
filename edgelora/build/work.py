"""One build in progress: its parts of the examples, its warnings, and the budget it keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from edgelora.build.clock import Clock
from edgelora.build.crossing import count_crossed_tokens
from edgelora.build.pool import Pool
from edgelora.build.proposals import count_candidates
from edgelora.build.records import CROSSED, GradientPlan, Listener, Options
from edgelora.build.trials import Budget
from edgelora.datasets.split import Split
from edgelora.datasets.template import Template
from edgelora.engine.model import Model
from edgelora.engine.prepare import tokenise_examples
from edgelora.engine.score import TokenisedExample, count_tokens
from edgelora.errors import EdgeLoRAError

# Of a build whose time is short, that come to the comparison with the base.
MOST_COMPARED = 3
# Examples that other candidates are tried on beside gradients: enough for a scale, and fewer where
# that leaves the descent more passes.
SHOWN = (24, 16, 8)
UNTOUCHED, OPTIMISTIC = "untouched", "selection part, optimistic"


@dataclass(frozen=True)
class Parts:
    """The tokenised parts of a dataset; `judged` is what the finished file is compared on.

    Where candidates are cross-validated, all examples are support, and there is no selection.
    """

    support: list[TokenisedExample]
    selection: list[TokenisedExample]
    judged: list[TokenisedExample]
    part: str

    @property
    def all(self) -> list[TokenisedExample]:
        """The examples of all parts."""
        return [*self.support, *self.selection, *self.judged]

    @property
    def is_crossed(self) -> bool:
        """Whether candidates are cross-validated."""
        return self.part == CROSSED

    @property
    def is_optimistic(self) -> bool:
        """Whether what is judged is the selection part."""
        return self.part == OPTIMISTIC


@dataclass
class Work:
    """What every step of one build needs.

    Attributes:
        options: with what `refine="auto"` came to; `asked` are those that a person gave.
        pool: what may take part, of the `whole` that the bank has (see narrowing).
        is_cut: whether time has cut the budget: then few candidates are compared.
        was_interrupted: whether gradient steps ended by Ctrl-C, with the best so far.
        n_learned: examples that gradients learn from, at most; None: see samples.MAX_EXAMPLES.
        n_shown: of these, that candidates are tried on beside gradients.
        n_done: tokens computed before the plan: of tests of speed, and embedding.
        tokens_per_s: see pace.measure_speed; NaN before.
        gradients_per_s: see automatic.measure_gradients; NaN before.
        merge_s: of one combination, see pace.measure_merge; NaN before.
    """

    model: Model
    template: Template
    options: Options
    clock: Clock
    pool: Pool
    out: Path
    budget: Budget
    gradient: GradientPlan | None = None
    is_cut: bool = False
    was_interrupted: bool = False
    n_learned: int | None = None
    n_shown: int = SHOWN[0]
    n_done: int = 0
    merge_s: float = math.nan
    tokens_per_s: float = math.nan
    gradients_per_s: float = math.nan
    warnings: list[str] = field(default_factory=list)
    asked: Options = field(init=False)
    whole: Pool = field(init=False)

    def __post_init__(self) -> None:
        self.asked, self.whole = self.options, self.pool

    @property
    def listener(self) -> Listener:
        """Who is told."""
        return self.clock.listener

    def warn(self, message: str) -> None:
        """Keep a warning for the result, and say it now."""
        self.warnings.append(message)
        self.listener.warn(message)

    def spend(self, n_tokens: int, what: str, *, at_once: bool = False) -> None:
        """Take tokens that the build cannot do without.

        Args:
            at_once: they are computed now, not only set aside.

        Raises:
            EdgeLoRAError: they are not left.
        """
        if not self.budget.take(n_tokens):
            raise EdgeLoRAError(
                f"a budget of {self.budget.n_tokens:,} tokens is too small: {what} takes "
                f"{n_tokens:,} and {self.budget.left:,} are left",
                hint="Give a larger --budget, or fewer or shorter examples.",
            )
        self.n_done += n_tokens * at_once


def tokenise_parts(work: Work, split: Split) -> Parts:
    """Token ids of all parts; the template's warnings are passed on."""
    support, selection, untouched = (
        tokenise_examples(work.model, work.template, part)
        for part in (split.support, split.selection, split.untouched)
    )
    for message in work.template.warnings:
        if message not in work.warnings:
            work.warn(message)
    if not split.selection:
        return Parts(support, [], support, CROSSED)
    if split.optimistic:
        return Parts(support, selection, selection, OPTIMISTIC)
    return Parts(support, selection, untouched, UNTOUCHED)


def reserve_comparisons(work: Work, parts: Parts) -> None:
    """Set the tokens of the comparisons aside, so that no search can eat them.

    Raises:
        EdgeLoRAError: the budget is smaller.
    """
    what = f"comparing {count_compared(work)} candidate(s) with the base"
    work.spend(count_reserved_tokens(work, parts), what)


def count_reserved_tokens(work: Work, parts: Parts) -> int:
    """Tokens that all comparisons with the base take."""
    n_tokens = (2 - parts.is_optimistic) * count_tokens(parts.judged)
    n_tokens += count_compared(work) * count_compared_tokens(parts)
    return n_tokens + count_tokens(parts.selection or parts.support)


def count_compared(work: Work) -> int:
    """Candidates that are compared, at least (see proposals.count_candidates)."""
    n_candidates = count_candidates(work.options, bool(work.pool.signed))
    return min(n_candidates, MOST_COMPARED) if work.is_cut else n_candidates


def count_compared_tokens(parts: Parts) -> int:
    """Tokens that one candidate's comparison with the others takes."""
    if parts.is_crossed:
        return count_crossed_tokens(parts.support)
    return count_tokens(parts.selection)
