"""Real forward passes of candidates on a user's examples, within a token budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import open_lora
from edgelora.adapters.merge import MergeReport, merge_adapters
from edgelora.build.means import write_sum
from edgelora.build.records import count_steps
from edgelora.engine.context import Context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import Score, TokenisedExample, count_tokens, mean_loss, score
from edgelora.operators.arbiter import Candidate

Array = NDArray[np.float64]

SCALES = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
TRIES_A_CANDIDATE = 3  # about as many scales are tried
NEGLIGIBLE = 0.01


class Budget:
    """Tokens that a build may compute, and those that it has.

    Attributes:
        was_short: whether something was asked for that was no longer left.
    """

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.n_used = 0
        self.was_short = False

    @property
    def left(self) -> int:
        """Tokens that may still be computed."""
        return self.n_tokens - self.n_used

    def take(self, n_tokens: int) -> bool:
        """Reserve `n_tokens` if they are left."""
        if n_tokens > self.left:
            self.was_short = True
            return False
        self.n_used += n_tokens
        return True

    def give_back(self, n_tokens: int) -> None:
        """Tokens that were reserved and not computed."""
        self.n_used -= n_tokens


@dataclass(frozen=True, eq=False)
class Recipe:
    """What makes a combination beside one coefficient for each adapter.

    Attributes:
        told: what joins the provenance.
        by_tensor: (k,) or for each component (k, r), by the tensor's name; {} for the same in all.
    """

    told: Mapping[str, object]
    by_tensor: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """A file, and the positions of the examples that it was found without.

    Attributes:
        path: None where nothing was found: there the base stands for it.
    """

    path: Path | None
    positions: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate with the file that stands for it at scale 1.

    Attributes:
        loss: on the support examples at the candidate's scale; NaN if it was not measured.
        is_final: whether the file is what would be written, byte for byte; then `merge` says how
            it was combined (None: it was not).
        folds: (k,) each, the coefficients that are found without the examples of one fold, the
            scale included; () where examples are not folded.
        held_out: in place of folds, the files of what was found without some of the examples.
        recipe: of a combination whose coefficients differ from tensor to tensor.
    """

    candidate: Candidate
    path: Path
    loss: float = float("nan")
    is_final: bool = False
    merge: MergeReport | None = None
    folds: tuple[Array, ...] = ()
    held_out: tuple[HeldOut, ...] = ()
    recipe: Recipe | None = None

    @property
    def weights(self) -> Array:
        """The coefficients with the scale, (k,)."""
        return self.candidate.coefficients * self.candidate.scale

    def weighted(self) -> list[WeightedAdapter]:
        """What a context applies to try it."""
        return [WeightedAdapter(self.path, self.candidate.scale)]


def make_trial(
    name: str,
    coefficients: Array,
    paths: Sequence[Path],
    folder: Path,
    *,
    hashes: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Trial:
    """Combine adapters into a file of `folder`; a single adapter is its own file.

    Args:
        hashes: of what is in the files, where they are known: then a sum with one coefficient for
            all comes from the cache, if it is there (see means).
        progress: (stage, tensors done, tensors in all).
    """
    kept = settled(coefficients)
    used = [int(i) for i in np.flatnonzero(kept)]
    if len(used) == 1:
        scale = float(kept[used[0]])
        return Trial(Candidate(name, kept / scale, scale), paths[used[0]])
    path = folder / f"{name.replace(' ', '-')}.gguf"
    values, files = [float(kept[i]) for i in used], [paths[i] for i in used]
    n_tensors = len(open_lora(files[0]).plan)
    tell = count_steps(f"combining {len(used)} adapters, tensors", n_tensors, progress)
    known = [hashes[i] for i in used] if hashes else []
    if len(set(values)) == 1 and all(known) and known:
        write_sum(files, known, values[0], path, progress=tell)
    else:
        merge_adapters(files, values, path, progress=tell)
    return Trial(Candidate(name, kept), path)


def settled(coefficients: Array) -> Array:
    """Coefficients without those below 1 % of the largest, the others rounded.

    So float noise in what they were computed from does not change a byte of the result.
    """
    negligible = np.abs(coefficients) < NEGLIGIBLE * np.abs(coefficients).max()
    kept = np.where(negligible, 0.0, coefficients).astype(np.float64)
    return np.asarray(kept.round(_decimals(coefficients)))


def _decimals(coefficients: Array) -> int:
    """Four, or as many as leave the largest three digits: in a large bank all are small."""
    largest = float(np.abs(coefficients).max())
    return max(4, 2 + math.ceil(-math.log10(largest))) if largest > 0 else 4


def try_scales(
    context: Context, trial: Trial, examples: Sequence[TokenisedExample], budget: Budget
) -> Trial:
    """Climb along SCALES from 1 to the least loss on `examples`; stops when the budget is spent."""
    return try_scales_without(context, trial, examples, budget, ())[0]


def try_scales_without(
    context: Context,
    trial: Trial,
    examples: Sequence[TokenisedExample],
    budget: Budget,
    left_out: Sequence[NDArray[np.bool_]],
) -> tuple[Trial, list[float]]:
    """The same, and of the scales tried the best without some of the examples, at no more passes.

    Args:
        left_out: (n,) each.

    Returns:
        The trial at its best scale, and by how much its own scale is multiplied without each part.
    """
    cost, first = count_tokens(examples), SCALES.index(1.0)
    tried: dict[int, list[Score]] = {}

    def loss_at(i: int) -> float:
        if not 0 <= i < len(SCALES):
            return float("inf")
        if i not in tried:
            if not budget.take(cost):
                return float("inf")
            context.apply([WeightedAdapter(trial.path, trial.candidate.scale * SCALES[i])])
            tried[i] = score(context, examples)
        return mean_loss(tried[i])

    best = first
    loss_at(best)
    for step in (1, -1):
        while loss_at(best + step) < (loss_at(best) if best in tried else float("inf")):
            best += step
        if best != first:
            break

    def best_without(out: NDArray[np.bool_]) -> int:
        def loss(i: int) -> float:
            return mean_loss([s for s, is_out in zip(tried[i], out, strict=True) if not is_out])

        return min(tried, key=loss, default=first)

    candidate = trial.candidate
    scaled = Candidate(candidate.name, candidate.coefficients, candidate.scale * SCALES[best])
    loss = mean_loss(tried[best]) if best in tried else float("nan")
    scales = [SCALES[best_without(out)] for out in left_out]
    return replace(trial, candidate=scaled, loss=loss), scales


def measure_trial(
    context: Context, trial: Trial, examples: Sequence[TokenisedExample], budget: Budget
) -> Trial:
    """The trial with its loss as it is; without, if the budget is spent."""
    if not budget.take(count_tokens(examples)):
        return trial
    return replace(trial, loss=mean_loss(score_trial(context, trial, examples)))


def score_trial(
    context: Context, trial: Trial | None, examples: Sequence[TokenisedExample]
) -> list[Score]:
    """Scores of a trial, or of the base (None)."""
    context.apply(trial.weighted() if trial else [])
    return score(context, examples)


def least_loss(trials: Sequence[Trial]) -> Trial:
    """The trial of the least support loss; those that were not measured count last."""
    return min(trials, key=lambda trial: trial.loss if math.isfinite(trial.loss) else math.inf)
