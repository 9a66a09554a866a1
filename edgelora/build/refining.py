"""Coefficients by gradients: the bank ranked by one pass, then steps, then a file to be judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.adapters.provenance import mean_coefficient
from edgelora.build.finish import write_combination
from edgelora.build.gradients import MAX_SOURCES, Gradients, threads
from edgelora.build.proposals import Nearness
from edgelora.build.records import PassLoss, Refined
from edgelora.build.state import State
from edgelora.build.trials import HeldOut, Recipe, Trial
from edgelora.build.work import Work
from edgelora.gradient.descent import Crossed, Descended, DescentOptions, descend, rank_adapters
from edgelora.gradient.minimise import GRADIENT_COST, Interrupted, Step
from edgelora.operators.arbiter import Candidate

Array = NDArray[np.float64]
NAME = "gradient"
OBJECTIVE_WORDS = {
    "loss": "the loss of the completions",
    "prompts": "the loss of the prompts themselves",
    "entropy": "the entropy of the first answer token",
}
COEFFICIENTS, FACTORS = "coefficients", "factors"


def refine(
    work: Work,
    gradients: Gradients,
    start: Candidate,
    nearness: Nearness | None,
    state: State,
    folder: Path,
    *,
    is_crossed: bool = False,
) -> tuple[Trial, Refined]:
    """Steps on the coefficients of the whole bank from those of `start`, and the file they make.

    Args:
        is_crossed: make the files of the folds too, for a comparison by cross-validation.

    Ctrl-C: `listener.keep` decides whether the best so far goes on; the state is kept if not.

    Raises:
        EdgeLoRAError: a loss that is not a number, or every coefficient is zero.
        KeyboardInterrupt: as above.
    """
    options = gradients.descent
    assert options is not None
    with threads(work):
        slopes = _rank(work, gradients) if gradients.reserved.is_ranked else None
        positions = list(range(len(gradients.adapters))) if slopes is None else _sources(slopes)
        files = [gradients.adapters[i] for i in positions]
        scaled = start.coefficients * start.scale
        found = _descend(work, gradients, options, files, scaled[positions], state)
    k = len(work.pool.records)
    by_tensor = _spread(found.coefficients, positions, k)
    refined = Refined(
        start=f"{start.name} x {start.scale:g}",
        weights=options.weights,
        objective=options.objective,
        n_examples=len(gradients.examples),
        n_passes=found.n_passes,
        support_losses=found.support_losses,
        held_out_losses=found.held_out_losses,
        slopes={} if slopes is None else dict(zip(work.pool.names, slopes.tolist(), strict=True)),
        n_sources=len(positions),
    )
    if found.held_out_losses and not found.n_passes:
        work.warn("no gradient pass lowered the held-out loss: the coefficients are the start's")
    candidate = Candidate(NAME, _means(by_tensor, gradients.adapters))
    recipe = Recipe(_told(refined), by_tensor)
    trial = _as_trial(work, candidate, recipe, nearness, folder)
    if is_crossed:
        write = partial(_write_fold, work, candidate, positions, nearness, folder)
        trial = replace(trial, held_out=tuple(write(fold) for fold in found.folds))
    return trial, refined


class Teller:
    """Tells the listener of a build how far steps are, and the losses of each pass.

    Args:
        n_tokens: of all descents of this stage.
        n_before: of those that are done.
    """

    def __init__(
        self, work: Work, stage: str, n_passes: int, n_tokens: int, *, n_before: int = 0
    ) -> None:
        self._listener = work.listener
        self._stage, self._n_passes = stage, n_passes
        self._n_tokens, self._n_before = n_tokens, n_before
        self._losses: list[float] = []

    def __call__(self, step: Step) -> None:
        """One step, or a look at held-out examples."""
        self._progress(step.n_tokens)
        if step.what == "step":
            self._losses.append(step.loss)
        if step.at_pass != int(step.at_pass):
            return
        support = float(np.mean(self._losses)) if self._losses else float("nan")
        self._losses.clear()
        n_done = int(step.at_pass)
        losses = PassLoss(self._stage, n_done, self._n_passes, support, step.held_out)
        self._listener.passed(losses)

    def end(self) -> None:
        """Whether or not all passes were needed."""
        self._progress(self._n_tokens)

    def _progress(self, n_tokens: int) -> None:
        n_done = min(self._n_before + n_tokens, self._n_tokens)
        self._listener.progress(progress_stage(self._stage), n_done, self._n_tokens)


def progress_stage(stage: str) -> str:
    """What progress of a stage is told of."""
    return f"gradient steps on {stage}, tokens"


def ask_to_keep(work: Work, stage: str, n_passes: int) -> bool:
    """Whether the best so far goes on after Ctrl-C."""
    return work.listener.keep(
        f"interrupted: go on with the {stage} as they are best so far (after {n_passes} pass(es))?"
    )


def _rank(work: Work, gradients: Gradients) -> Array:
    """The slope along each adapter at the base, (k,)."""
    work.listener.progress("ranking the bank by its gradient", 0, 1)
    slopes = rank_adapters(
        gradients.decoder,
        gradients.adapters,
        gradients.objective_examples,
        {},
        passes=gradients.measured_passes,
    )
    work.listener.progress("ranking the bank by its gradient", 1, 1)
    return slopes


def _sources(slopes: Array) -> list[int]:
    """All adapters, or those of the steepest slopes, in the pool's order."""
    return sorted(int(i) for i in np.argsort(slopes, kind="stable")[:MAX_SOURCES])


def _descend(
    work: Work,
    gradients: Gradients,
    options: DescentOptions,
    files: Sequence[LoraFile],
    start: Array,
    state: State,
) -> Descended:
    n_tokens = gradients.reserved.n_descent_tokens
    if gradients.reserved.is_ranked:
        n_rows = gradients.decoder.count_rows(gradients.objective_examples, gradients.passes)
        n_tokens -= GRADIENT_COST * n_rows
    course = replace(options, n_passes=0)
    hashes = tuple(work.pool.hashes)
    identity = work.model.base.identity.id
    examples, held_out = gradients.examples, gradients.held_out
    path = state.path(COEFFICIENTS, identity, hashes, examples, held_out, start, course)
    tell = Teller(work, COEFFICIENTS, options.n_passes, n_tokens)
    try:
        found = descend(
            gradients.decoder, files, examples, start, options,
            passes=gradients.passes, listen=tell, checkpoint=path, held_out=held_out,
            prepare=partial(work.listener.progress, "principal directions of the bank, tensors"),
        )  # fmt: skip
    except Interrupted as stopped:
        if not ask_to_keep(work, COEFFICIENTS, stopped.best.n_passes):
            raise
        found, work.was_interrupted = stopped.best, True
    tell.end()
    work.budget.give_back(n_tokens - found.n_tokens)
    return found


def _spread(
    coefficients: Mapping[str, Array], positions: Sequence[int], k: int
) -> dict[str, Array]:
    """Of all k, with zeros for those that took no part; rounded to what a provenance holds."""
    found = {}
    for name, row in coefficients.items():
        found[name] = np.zeros((k, *row.shape[1:]))
        found[name][list(positions)] = row.astype(np.float16)
    return found


def _means(by_tensor: dict[str, Array], files: Sequence[LoraFile]) -> Array:
    """One number for each adapter, (k,), to be shown."""
    names, table = list(by_tensor), np.array(list(by_tensor.values()))
    return np.array([mean_coefficient(table[:, i], names, f.ranks) for i, f in enumerate(files)])


def _as_trial(
    work: Work, candidate: Candidate, recipe: Recipe, nearness: Nearness | None, folder: Path
) -> Trial:
    """The combination as a file, written as it would be published."""
    path = folder / f"{NAME}.gguf"
    merge = write_combination(work, candidate, nearness, path, recipe)
    return Trial(candidate, path, is_final=True, merge=merge, recipe=recipe)


def _write_fold(
    work: Work,
    candidate: Candidate,
    positions: Sequence[int],
    nearness: Nearness | None,
    folder: Path,
    fold: Crossed,
) -> HeldOut:
    """What was found without one fold, combined as the whole is."""
    path = folder / f"{NAME}-without-{fold.held_out[0]}.gguf"
    by_tensor = _spread(fold.coefficients, positions, len(work.pool.records))
    write_combination(work, candidate, nearness, path, Recipe({}, by_tensor))
    return HeldOut(path, fold.held_out)


def _told(refined: Refined) -> dict[str, object]:
    """What the provenance says of the descent."""
    return {
        "refined": {
            "by": NAME,
            "weights": refined.weights,
            "objective": refined.objective,
            "start": refined.start,
            "examples": refined.n_examples,
            "passes": refined.n_passes,
        }
    }
