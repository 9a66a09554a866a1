"""Descents in lockstep: minibatch steps of every fold, stopped where what is held out is best."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.engine.score import Score, TokenisedExample, mean_loss
from edgelora.errors import EdgeLoRAError
from edgelora.files import write_atomic
from edgelora.gradient.adam import Adam, Track, advance, begin
from edgelora.gradient.checkpoint import Checkpoint, Tally, from_bytes
from edgelora.gradient.decoder import Decoder, PassOptions
from edgelora.gradient.folds import Fold, Unit, make_folds, units_of_pass
from edgelora.gradient.variables import Variables

# Seconds between two states on disk: writing one takes far less than that.
CHECKPOINT_EVERY_S = 20.0
GRADIENT_COST = 3  # forward-equivalents


@dataclass(frozen=True)
class Schedule:
    """How long a descent goes on, and on how many examples a step.

    Attributes:
        n_passes: at most; a pass shows every example once.
        prompts: of each example; those of one prompt are held out together.
        batch_size: examples a step; 0 for all.
        n_folds: of the cross-validation that stops the descent; 0 for none.
        n_held_out: the last examples, so many, stop it instead, and are not learned from.
        patience: passes without a better held-out loss after which it stops.
        enough: the held-out loss, nats a token, at which it stops: see `vouched_loss`.
    """

    n_passes: int
    batch_size: int
    n_folds: int
    patience: int
    seed: int
    prompts: tuple[Hashable, ...]
    enough: float = 0.0
    n_held_out: int = 0

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Who sees which examples."""
        if not self.n_held_out:
            return make_folds(self.prompts, self.n_folds, self.seed)
        everything = tuple(range(len(self.prompts)))
        return (Fold(everything[: -self.n_held_out], everything[-self.n_held_out :]),)

    @property
    def is_judged(self) -> bool:
        """Whether examples that are not learned from stop it."""
        return self.n_folds > 0 or self.n_held_out > 0


@dataclass(frozen=True)
class Step:
    """What a listener is told after each step and each look at held-out examples.

    Attributes:
        what: "step" or "held out".
        at_pass: passes done so far, the fraction of the present one included.
        loss: of the examples that were just computed, before the step.
        held_out: the latest whole held-out loss; None before the first.
        n_tokens: forward-equivalent tokens so far.
    """

    what: str
    at_pass: float
    loss: float
    held_out: float | None
    n_tokens: int


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a descent; the state on disk is whole.

    Attributes:
        best: the result if it ends here; the start if no pass was finished.
    """

    def __init__(self, best: Any) -> None:
        super().__init__()
        self.best = best


@dataclass(frozen=True, eq=False)
class Minimisation:
    """One descent: what is varied, on which examples, and by which rules."""

    decoder: Decoder
    variables: Variables
    examples: Sequence[TokenisedExample]
    adam: Adam
    schedule: Schedule
    passes: PassOptions
    key: str

    def open(self, path: Path | None) -> Checkpoint:
        """The state on disk, or a new one.

        Raises:
            InvalidFile: a damaged file.
            EdgeLoRAError: the state of another descent, or of one that went further.
        """
        if path is None or not path.exists():
            tracks = (begin(self.variables.start),) * len(self.schedule.folds)
            tally = Tally(in_pass=0 if self.schedule.is_judged else 1)
            return Checkpoint(self.key, tracks, (self.variables.start,) * len(tracks), tally)
        state = from_bytes(path.read_bytes(), str(path))
        if state.key != self.key:
            raise EdgeLoRAError(
                f"{path}: the state of another descent (other examples, adapters or options)",
                hint="Delete it, or go on with what it was made for.",
            )
        if state.tally.in_pass - 1 > self.schedule.n_passes:
            raise EdgeLoRAError(
                f"{path}: {state.tally.in_pass - 1} passes are done already, more than "
                f"{self.schedule.n_passes}",
                hint="Delete it, or allow as many passes.",
            )
        return state

    def run(
        self, state: Checkpoint, listen: Callable[[Step], None], path: Path | None
    ) -> tuple[Checkpoint, bool]:
        """Go on to the end, keeping the state at `path`.

        Returns:
            The last whole state, and whether it was interrupted before the end.

        Raises:
            EdgeLoRAError: a loss that is not a number; the state before it is kept.
        """
        saved_at = time.monotonic()
        try:
            while not self._is_done(state.tally):
                state, step = self._compute(state)
                listen(step)
                if path is not None and time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                    write_atomic(path, state.to_bytes())
                    saved_at = time.monotonic()
        except KeyboardInterrupt:
            return state, True
        finally:
            if path is not None:
                write_atomic(path, state.to_bytes())
        return state, False

    def _is_done(self, tally: Tally) -> bool:
        if tally.in_pass > self.schedule.n_passes:
            return True
        if not self.schedule.is_judged:
            return False
        waited = tally.in_pass - 1 - tally.best_pass
        is_enough = min(tally.held_out_losses, default=math.inf) <= self.schedule.enough
        return is_enough or waited >= self.schedule.patience

    def _units(self, number: int) -> tuple[Unit, ...]:
        schedule = self.schedule
        return units_of_pass(schedule.folds, number, schedule.batch_size, schedule.seed)

    def _texts(self, unit: Unit) -> list[TokenisedExample]:
        return [self.examples[i] for i in unit.positions]

    def _compute(self, state: Checkpoint) -> tuple[Checkpoint, Step]:
        """One unit more, and what is said of it."""
        tally, units = state.tally, self._units(state.tally.in_pass)
        unit = units[tally.unit]
        tracks = list(state.tracks)
        tracks[unit.track], scores = self._moved(tracks[unit.track], unit)
        seen, unseen = ([], scores) if unit.held_out else (scores, [])
        tally = dataclasses.replace(
            tally,
            unit=tally.unit + 1,
            n_tokens=tally.n_tokens + _cost(self.decoder, self._texts(unit), unit, self.passes),
            support=_added(tally.support, seen),
            held_out=_added(tally.held_out, unseen),
        )
        begun = max(0, tally.in_pass - 1)
        part = tally.unit / len(units) if tally.in_pass else 0.0
        state = dataclasses.replace(state, tracks=tuple(tracks), tally=tally)
        if tally.unit == len(units):
            state = self._ended(state)
        losses = state.tally.held_out_losses
        return state, Step(
            what="held out" if unit.held_out else "step",
            at_pass=begun + part,
            loss=mean_loss(scores),
            held_out=losses[-1] if losses else None,
            n_tokens=tally.n_tokens,
        )

    def _moved(self, track: Track, unit: Unit) -> tuple[Track, list[Score]]:
        """The track after the unit, and what was measured before it."""
        texts = self._texts(unit)
        if unit.held_out:
            updates = self.variables.updates(track.average)
            return track, self.decoder.losses(texts, updates, self.passes)
        gradient, scores = self.variables.gradient(self.decoder, texts, track.values, self.passes)
        if not math.isfinite(mean_loss(scores)) or not np.isfinite(gradient).all():
            raise EdgeLoRAError(
                f"the loss is not a number after {track.n_steps} steps",
                hint="Choose a smaller step, or another start.",
            )
        return advance(track, gradient, self.variables.start, self.adam), scores

    def _ended(self, state: Checkpoint) -> Checkpoint:
        """The state after the last unit of a pass: what it has seen is added up."""
        tally = state.tally
        held_out_losses = _appended(tally.held_out_losses, tally.held_out)
        is_best = _is_best(held_out_losses)
        return dataclasses.replace(
            state,
            best=tuple(track.average for track in state.tracks) if is_best else state.best,
            tally=Tally(
                in_pass=tally.in_pass + 1,
                best_pass=tally.in_pass if is_best else tally.best_pass,
                support_losses=_appended(tally.support_losses, tally.support),
                held_out_losses=held_out_losses,
                n_tokens=tally.n_tokens,
            ),
        )


def _appended(losses: tuple[float, ...], met: tuple[float, int]) -> tuple[float, ...]:
    nats, n_tokens = met
    return (*losses, nats / n_tokens) if n_tokens else losses


def vouched_loss(examples: Sequence[TokenisedExample]) -> float:
    """The lowest held-out loss that so few examples can vouch for, nats a completion token.

    Who was right n times of n is right the next time with a probability of (n + 1) / (n + 2)
    (Laplace's rule of succession), which makes log((n + 2) / (n + 1)) nats an answer. A descent
    that goes on below it only grows surer of itself: of four examples of one class it learns that
    there is no other.
    """
    n_answers = len({example.prompt for example in examples})
    n_tokens = max(1, sum(len(example.completion) for example in examples))
    return math.log((n_answers + 2) / (n_answers + 1)) * len(examples) / n_tokens


def count_tokens(
    decoder: Decoder,
    examples: Sequence[TokenisedExample],
    schedule: Schedule,
    passes: PassOptions,
) -> int:
    """Forward-equivalent tokens of a descent that is not stopped early."""
    folds = schedule.folds
    costs = [0, 0]
    for number in (0, 1):
        for unit in units_of_pass(folds, number, schedule.batch_size, schedule.seed):
            costs[number] += _cost(decoder, [examples[i] for i in unit.positions], unit, passes)
    return costs[0] + schedule.n_passes * costs[1]


def _cost(
    decoder: Decoder, texts: Sequence[TokenisedExample], unit: Unit, passes: PassOptions
) -> int:
    rows = decoder.count_rows(texts, passes)
    return rows if unit.held_out else GRADIENT_COST * rows


def _added(met: tuple[float, int], scores: Sequence[Score]) -> tuple[float, int]:
    return met[0] + sum(s.nll for s in scores), met[1] + sum(s.n_tokens for s in scores)


def _is_best(held_out_losses: Sequence[float]) -> bool:
    """Whether the last is below all before it; without any, the last pass is taken."""
    return not held_out_losses or held_out_losses[-1] < min(held_out_losses[:-1], default=math.inf)
