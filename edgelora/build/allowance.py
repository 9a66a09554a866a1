"""What budget and time leave to gradients, beside the candidates that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.build.pace import measure_speed
from edgelora.build.proposals import count_candidates
from edgelora.build.samples import shown_of
from edgelora.build.trials import TRIES_A_CANDIDATE
from edgelora.build.work import Work
from edgelora.engine.score import TokenisedExample, count_tokens


def count_others(work: Work, examples: Sequence[TokenisedExample], n_shown: int) -> int:
    """Tokens that embedding the examples and trying the candidates on `n_shown` may take."""
    n_embedded = sum(example.n_tokens for example in examples)
    if not all(example.completion for example in examples):
        return n_embedded
    n_passes = 1 + TRIES_A_CANDIDATE * count_candidates(work.options, bool(work.pool.signed))
    return n_embedded + n_passes * count_tokens(shown_of(work, examples, n_shown))


@dataclass(frozen=True, eq=False)
class Allowance:
    """What gradients may take: of the budget, and of the time at their speed in tokens a second."""

    work: Work
    examples: Sequence[TokenisedExample]
    seconds: float
    speed: float

    def with_others_on(self, n_shown: int) -> tuple[int, str]:
        """Tokens left for gradients where candidates are tried on `n_shown`; what limits them."""
        others = count_others(self.work, self.examples, n_shown)
        by_budget = self.work.budget.left - others
        if math.isinf(self.seconds):
            return by_budget, "the budget"
        seconds = self.seconds - others / measure_speed(self.work, self.examples)
        by_time = int(self.speed * seconds)
        return min((by_budget, "the budget"), (by_time, "the time"))
