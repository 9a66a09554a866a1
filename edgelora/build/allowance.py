"""What budget and time leave to gradients, beside the candidates that they are compared with."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.build.pace import measure_speed
from edgelora.build.proposals import count_candidates
from edgelora.build.trials import TRIES_A_CANDIDATE
from edgelora.build.work import Parts, Work
from edgelora.engine.score import TokenisedExample, count_tokens

# More examples than this cost more than they tell; a sample is drawn by the seed.
MAX_EXAMPLES = 64
# Examples of the selection part that stop a descent. So many tell well enough when, and in the
# place of folds they leave all of the support part to learn from, at less than half of the tokens.
N_HELD_OUT = 16


def sampled(
    examples: Sequence[TokenisedExample], seed: int, *, most: int | None = None
) -> list[TokenisedExample]:
    """At most so many (MAX_EXAMPLES), drawn by the seed, in their order."""
    most = most or MAX_EXAMPLES
    if len(examples) <= most:
        return list(examples)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), most))
    return [examples[i] for i in chosen]


def learned_of(work: Work, examples: Sequence[TokenisedExample]) -> list[TokenisedExample]:
    """The examples that gradients learn from."""
    return sampled(examples, work.options.seed, most=work.n_learned)


def held_out_of(work: Work, parts: Parts) -> list[TokenisedExample]:
    """The examples that stop a descent; none where the selection part has not enough of them."""
    if len(parts.selection) < N_HELD_OUT:
        return []
    return sampled(parts.selection, work.options.seed, most=N_HELD_OUT)


def shown_of(work: Work, examples: Sequence[TokenisedExample]) -> list[TokenisedExample]:
    """The examples that candidates are tried on beside gradients: all that there are, if few."""
    return _shown(work, examples, work.n_shown)


def _shown(
    work: Work, examples: Sequence[TokenisedExample], n_shown: int
) -> list[TokenisedExample]:
    return sampled(learned_of(work, examples), work.options.seed, most=n_shown)


def count_others(work: Work, examples: Sequence[TokenisedExample], n_shown: int) -> int:
    """Tokens that embedding the examples and trying the candidates on `n_shown` may take."""
    n_embedded = sum(example.n_tokens for example in examples)
    if not all(example.completion for example in examples):
        return n_embedded
    n_passes = 1 + TRIES_A_CANDIDATE * count_candidates(work.options, bool(work.pool.signed))
    return n_embedded + n_passes * count_tokens(_shown(work, examples, n_shown))


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
