"""What gradients cost, and the tokens that a build sets aside for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgelora.build.allowance import Allowance
from edgelora.build.crossing import assign_folds, part_of
from edgelora.build.work import SHOWN
from edgelora.engine.score import TokenisedExample
from edgelora.gradient.decoder import Decoder, PassOptions
from edgelora.gradient.descent import (
    DescentOptions,
    count_descent_tokens,
    count_folds,
    objective_examples,
)
from edgelora.gradient.folds import make_folds
from edgelora.gradient.minimise import GRADIENT_COST
from edgelora.gradient.polish import PolishOptions, count_polish_tokens

_PASSES_WORTH_IT = 3
# Each of four folds learns from three quarters of the examples, of two from half: that is worth
# more than twice the tokens, as long as the descent has about the passes that it is stopped after.
FEWER_FOLDS, _PASSES_IN_ALL_FOLDS = 2, 5


@dataclass(frozen=True)
class Costs:
    """Tokens of ranking the bank, of looking at the start, and of each pass of a descent."""

    ranking: int
    start: int
    each: int

    def of(self, n_passes: int, *, is_ranked: bool) -> int:
        """Of a descent, and of the ranking before it."""
        return self.ranking * is_ranked + self.start + n_passes * self.each


@dataclass(frozen=True)
class Reserved:
    """What is set aside.

    Attributes:
        descent: with the passes and folds that are allowed; None where none was asked for.
        n_descent_tokens: for ranking and descent.
        n_polish_tokens: for training factors.
        is_ranked: whether the bank is ranked before the descent: where not all of it takes part,
            or where that costs no pass.
    """

    descent: DescentOptions | None
    n_descent_tokens: int
    n_polish_tokens: int
    is_ranked: bool = False


@dataclass(frozen=True, eq=False)
class Reserving:
    """Counts what gradients on these examples take.

    Attributes:
        is_large: whether not all of the bank takes part in a descent.
        is_crossed: whether candidates are cross-validated.
        held_out: other examples, which stop a descent in the place of folds.
    """

    decoder: Decoder
    examples: Sequence[TokenisedExample]
    passes: PassOptions
    is_large: bool
    is_crossed: bool
    held_out: Sequence[TokenisedExample] = ()

    def reserve(
        self, allowed: Allowance, descent: DescentOptions | None, polish: PolishOptions | None
    ) -> Reserved:
        """Set tokens aside for as many passes as budget and time allow, and as were asked for.

        So that the descent has some passes, it has fewer folds, other candidates are tried on fewer
        examples, and a bank of which all takes part is not ranked.

        Raises:
            EdgeLoRAError: a budget too small for one pass.
        """
        work = allowed.work
        n_polish = self.count_polish(polish, descent)
        if descent is None:
            work.spend(n_polish, f"{work.options.polish} pass(es) on factors")
            return Reserved(None, 0, n_polish)
        costs = self.count(descent)
        least = n_polish + self._least(costs, descent, _PASSES_IN_ALL_FOLDS)
        if not self.held_out and least > allowed.with_others_on(work.n_shown)[0]:
            descent = replace(descent, n_folds=FEWER_FOLDS)
            costs = self.count(descent)
        if not self.is_crossed:
            least = n_polish + self._least(costs, descent, _PASSES_WORTH_IT)
            fitting = (n for n in SHOWN if least <= allowed.with_others_on(n)[0])
            work.n_shown = next(fitting, SHOWN[-1])
        spare, why = allowed.with_others_on(work.n_shown)
        spare -= n_polish
        is_ranked = self.is_large or costs.of(descent.n_passes, is_ranked=True) <= spare
        n_passes = (spare - costs.of(0, is_ranked=is_ranked)) // costs.each
        n_passes = max(1, min(descent.n_passes, n_passes))
        n_descent = costs.of(n_passes, is_ranked=is_ranked)
        work.spend(
            n_descent + n_polish,
            f"{n_passes} pass(es) of gradients on coefficients"
            + (f" and {work.options.polish} on factors" if n_polish else ""),
        )
        if n_passes < descent.n_passes:
            work.warn(
                f"{why} allows {n_passes} gradient pass(es) of {descent.n_passes}; one takes "
                f"{costs.each:,} tokens"
            )
        return Reserved(replace(descent, n_passes=n_passes), n_descent, n_polish, is_ranked)

    def count(self, descent: DescentOptions) -> Costs:
        """What a descent takes."""
        none, one = (
            count_descent_tokens(
                self.decoder,
                self.examples,
                replace(descent, n_passes=n),
                self.passes,
                self.held_out,
            )
            for n in (0, 1)
        )
        texts = objective_examples(self.examples, descent.objective)
        n_rows = self.decoder.count_rows(texts, self.passes)
        return Costs(GRADIENT_COST * n_rows, none, one - none)

    def count_polish(self, polish: PolishOptions | None, descent: DescentOptions | None) -> int:
        """What training takes on all examples and, cross-validated, without each fold.

        The folds are those of the candidate that training begins with: the most that it may be.
        """
        if polish is None:
            return 0
        examples = list(self.examples)
        return self._count_polish(polish, examples) + max(
            (
                sum(self._count_polish(polish, part) for part in parts)
                for parts in self._parts_seen(descent)
            ),
            default=0,
        )

    def _parts_seen(self, descent: DescentOptions | None) -> Iterator[list[list[TokenisedExample]]]:
        """The examples without each fold, in each way that candidates are cross-validated."""
        if not self.is_crossed:
            return
        folds = assign_folds(self.examples)
        yield [part_of(self.examples, folds != fold) for fold in np.unique(folds)]
        if descent is not None:
            prompts = [example.prompt for example in self.examples]
            for_descent = make_folds(prompts, count_folds(self.examples, descent), descent.seed)
            yield [[self.examples[i] for i in fold.seen] for fold in for_descent]

    def _count_polish(self, polish: PolishOptions, examples: list[TokenisedExample]) -> int:
        return count_polish_tokens(self.decoder, examples, polish, self.passes)

    def _least(self, costs: Costs, descent: DescentOptions, n_passes: int) -> int:
        """What so many passes take, or all if they are fewer; nothing is ranked needlessly."""
        return costs.of(min(descent.n_passes, n_passes), is_ranked=self.is_large)
