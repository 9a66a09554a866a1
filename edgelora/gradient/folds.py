"""Who sees which examples: folds that are held out in turn, and minibatches in seeded order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.errors import EdgeLoRAError


@dataclass(frozen=True)
class Fold:
    """Positions of the examples that one track learns from, and of those that judge it."""

    seen: tuple[int, ...]
    held_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unit:
    """What is computed at a time: a step of one track on some examples, or a look at others."""

    track: int
    positions: tuple[int, ...]
    held_out: bool = False


def make_folds(n_examples: int, n_folds: int, seed: int) -> tuple[Fold, ...]:
    """Every example held out once, in folds that differ by one at most; 0: none is held out.

    Raises:
        EdgeLoRAError: no examples, one fold, or more folds than examples.
    """
    if not n_examples:
        raise EdgeLoRAError("no examples to learn from")
    everything = tuple(range(n_examples))
    if n_folds == 0:
        return (Fold(everything),)
    if n_folds < 2 or n_folds > n_examples:
        raise EdgeLoRAError(
            f"{n_folds} folds of {n_examples} examples",
            hint="At least 2 folds, at most one for each example, or 0 for none.",
        )
    order = np.random.default_rng([seed, 0]).permutation(n_examples)
    parts = [sorted(int(i) for i in order[number::n_folds]) for number in range(n_folds)]
    return tuple(
        Fold(tuple(i for i in everything if i not in set(part)), tuple(part)) for part in parts
    )


def units_of_pass(
    folds: Sequence[Fold], number: int, batch_size: int, seed: int
) -> tuple[Unit, ...]:
    """Pass `number`, from 1: each track sees all its examples once, then is judged.

    Before the first, pass 0 judges the start, which all tracks share.
    """
    if number == 0:
        judged = tuple(sorted(i for fold in folds for i in fold.held_out))
        return (Unit(0, judged, held_out=True),) if judged else ()
    units = []
    for track, fold in enumerate(folds):
        order = np.random.default_rng([seed, number, track]).permutation(fold.seen)
        size = batch_size or len(order)
        for start in range(0, len(order), size):
            units.append(Unit(track, tuple(int(i) for i in order[start : start + size])))
        if fold.held_out:
            units.append(Unit(track, fold.held_out, held_out=True))
    return tuple(units)
