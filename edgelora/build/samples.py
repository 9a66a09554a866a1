"""Which of a user's examples a build learns from, is stopped by, and tries candidates on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from edgelora.build.crossing import is_crossed
from edgelora.build.work import Parts, Work
from edgelora.datasets.records import Dataset
from edgelora.datasets.split import Split, split_examples
from edgelora.engine.score import TokenisedExample

# More examples than this cost more than they tell; a sample is drawn by the seed.
MAX_EXAMPLES = 64
# Examples of the selection part that stop a descent, at most and at least. They tell well enough
# when, and in the place of folds they leave all of the support part to learn from, at about half
# of the tokens.
N_HELD_OUT, LEAST_HELD_OUT = 16, 6


def split_for(work: Work, dataset: Dataset) -> Split:
    """The parts; few examples are all for support where candidates can be cross-validated.

    Gradients have more to learn from without an untouched part, as long as half of the examples are
    fewer than they may learn from.
    """
    split = split_examples(dataset.examples, seed=work.options.seed)
    if split.optimistic and is_crossed(work.options):
        return Split(dataset.examples, (), (), optimistic=True)
    is_scarce = len(split.support) < MAX_EXAMPLES and len(split.selection) >= LEAST_HELD_OUT
    if is_scarce and work.options.may_need_gradients:
        learned = {*split.support, *split.untouched}
        support = tuple(example for example in dataset.examples if example in learned)
        return Split(support, split.selection, (), optimistic=True)
    return split


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
    if len(parts.selection) < LEAST_HELD_OUT:
        return []
    return sampled(parts.selection, work.options.seed, most=N_HELD_OUT)


def shown_of(
    work: Work, examples: Sequence[TokenisedExample], n_shown: int | None = None
) -> list[TokenisedExample]:
    """The examples that candidates are tried on beside gradients: all that there are, if few.

    Args:
        n_shown: at most; None: work.n_shown.
    """
    most = work.n_shown if n_shown is None else n_shown
    return sampled(learned_of(work, examples), work.options.seed, most=most)
