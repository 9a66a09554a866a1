"""Cross-validation of candidates: found without a part of the examples, judged on that part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgelora.build.alone import Measured
from edgelora.build.proposals import ACTIVATED, WARM_STARTS
from edgelora.build.records import Options
from edgelora.engine.score import TokenisedExample, count_tokens

N_FOLDS = 3
# They see every example at once: what they would find without a fold is not known.
_UNCROSSED = frozenset(WARM_STARTS) - {"relinearised"} | frozenset(ACTIVATED)


def is_crossed(options: Options) -> bool:
    """Whether all candidates of a build can be found again without a fold.

    At no more passes, but for trained factors: these are trained anew without each fold.
    """
    return options.operator not in _UNCROSSED


def assign_folds(examples: Sequence[TokenisedExample], n_folds: int = N_FOLDS) -> NDArray[np.int64]:
    """The fold of each example, (n,); those of one prompt share one.

    Each prompt joins the smallest fold so far, in the order given.
    """
    sizes = [0] * n_folds
    fold_of: dict[tuple[int, ...], int] = {}
    for example in examples:
        fold = fold_of.setdefault(example.prompt, sizes.index(min(sizes)))
        sizes[fold] += 1
    return np.array([fold_of[example.prompt] for example in examples], np.int64)


def owners_of(examples: Sequence[TokenisedExample]) -> NDArray[np.int64]:
    """The number of the example that each completion token belongs to, (t,)."""
    return np.repeat(np.arange(len(examples)), [len(e.completion) for e in examples])


def count_crossed_tokens(examples: Sequence[TokenisedExample]) -> int:
    """Tokens of one candidate's comparison: each fold under the adapter that never saw it."""
    folds = assign_folds(examples)
    return sum(count_tokens(part_of(examples, folds == fold)) for fold in np.unique(folds))


def part_of(
    examples: Sequence[TokenisedExample], mask: NDArray[np.bool_]
) -> list[TokenisedExample]:
    """The examples where the mask is true."""
    return [example for example, kept in zip(examples, mask, strict=True) if kept]


def without(measured: Measured, left_out: NDArray[np.bool_]) -> Measured:
    """What was measured, but for the tokens (t,) that are left out."""
    return replace(measured, seen=measured.seen & ~left_out)
