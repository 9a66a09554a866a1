"""Who sees which examples: folds that are held out in turn, and minibatches in seeded order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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


def make_folds(prompts: Sequence[Hashable], n_folds: int, seed: int) -> tuple[Fold, ...]:
    """Every example held out once, in folds of about one size; 0: none is held out.

    Args:
        prompts: of each example; those of one prompt share a fold.

    Raises:
        EdgeLoRAError: no examples, one fold, or more folds than prompts.
    """
    if not prompts:
        raise EdgeLoRAError("no examples to learn from")
    everything = tuple(range(len(prompts)))
    if n_folds == 0:
        return (Fold(everything),)
    groups: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    if n_folds < 2 or n_folds > len(groups):
        raise EdgeLoRAError(
            f"{n_folds} folds of {len(groups)} different prompts",
            hint="At least 2 folds, at most one for each prompt, or 0 for none.",
        )
    parts: list[list[int]] = [[] for _ in range(n_folds)]
    members = list(groups.values())
    for number in np.random.default_rng([seed, 0]).permutation(len(members)):
        min(parts, key=len).extend(members[number])
    return tuple(
        Fold(tuple(i for i in everything if i not in set(part)), tuple(sorted(part)))
        for part in parts
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
