"""Coefficients of a bank's adapters by gradient descent on a few examples, stopped in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.engine.score import TokenisedExample, shared_prefix
from edgelora.errors import EdgeLoRAError
from edgelora.gradient import layers
from edgelora.gradient.adam import Adam
from edgelora.gradient.checkpoint import Checkpoint, fingerprint
from edgelora.gradient.components import Components
from edgelora.gradient.decoder import Decoder, PassOptions
from edgelora.gradient.minimise import (
    Interrupted,
    Minimisation,
    Schedule,
    Step,
    count_tokens,
    vouched_loss,
)
from edgelora.gradient.observers import CoefficientGradients, per_adapter
from edgelora.gradient.updates import Updates, refuse_misfits
from edgelora.gradient.variables import WEIGHTS, Coefficients, Combination

OBJECTIVES = ("loss", "prompts", "entropy")


@dataclass(frozen=True)
class DescentOptions:
    """How coefficients are found; the defaults are the best of docs/gradient.md.

    Attributes:
        weights: one coefficient for each rank-one "component" of an adapter in each tensor, one
            for each "tensor", for each "layer", or one for the whole "adapter".
        n_passes: over the examples, at most.
        batch_size: examples a step; 0 for all.
        step, momentum, memory, penalty, sparsity, averaging: see adam.Adam.
        n_folds: of the cross-validation that stops the descent, one for each prompt if there are
            fewer; 0, or a single prompt, runs all passes. With K of them a pass costs 3 K - 2
            forward passes.
        patience: passes without a better held-out loss after which it stops.
        enough: it stops below this much of the held-out loss that so few examples can vouch for,
            see minimise.vouched_loss; 0: never.
        objective: "loss" of the completions; without completions "prompts", the loss of the
            prompts after what they share, or "entropy" of the first answer token
            (arXiv:2310.02575).
    """

    weights: str = "component"
    n_passes: int = 10
    batch_size: int = 2
    step: float = 0.04
    penalty: float = 0.0
    sparsity: float = 0.0
    n_folds: int = 4
    seed: int = 0
    objective: str = "loss"
    momentum: float = 0.9
    memory: float = 0.99
    averaging: float = 0.8
    patience: int = 2
    enough: float = 1.0


@dataclass(frozen=True, eq=False)
class Crossed:
    """What the descent of one fold found.

    Attributes:
        coefficients: see Descended.
        held_out: positions of the examples that it did not learn from.
    """

    coefficients: dict[str, NDArray[np.float64]]
    held_out: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Descended:
    """What a descent found.

    Attributes:
        coefficients: tensor name -> (k,) float64, or for components (k, largest rank), what
            `updates.Combined` and a merge take. With folds it is the mean of what the folds found,
            so that every example has a say.
        n_passes: at which it was stopped: the pass that the coefficients are from.
        support_losses: nats a token in each pass, met before each step.
        held_out_losses: cross-validated, at the start and after each pass; empty without folds.
        n_tokens: forward-equivalent tokens that were computed; a gradient pass counts three.
        folds: what each fold found, at the same pass; () without folds.
    """

    coefficients: dict[str, NDArray[np.float64]]
    n_passes: int
    support_losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    n_tokens: int
    folds: tuple[Crossed, ...] = ()


def descend(
    decoder: Decoder,
    adapters: Sequence[LoraFile],
    examples: Sequence[TokenisedExample],
    start: NDArray[np.float64],
    options: DescentOptions | None = None,
    *,
    passes: PassOptions | None = None,
    listen: Callable[[Step], None] = lambda step: None,
    prepare: Callable[[int, int], None] = lambda done, total: None,
    checkpoint: Path | None = None,
    held_out: Sequence[TokenisedExample] = (),
) -> Descended:
    """Adam on the coefficients of `adapters` for each tensor, from `start`.

    With folds, each fold's descent learns from the other folds and is judged by its own; all go
    on pass by pass until the loss of what they have not seen, taken together, no longer falls.
    With examples `held_out` there are no folds: one descent learns from all, and these stop it.
    The same inputs give the same coefficients, also when it was interrupted and goes on.

    Args:
        start: (k,), the coefficient of each adapter in every tensor.
        passes: how a pass is run; its objective is that of `options`.
        prepare: called with the tensors whose components are prepared, and their number.
        checkpoint: where the state is kept; a descent goes on from there. It stays at the end:
            going on returns the result at once, or adds the passes that are allowed now.
        held_out: examples that share no prompt with the others.

    Raises:
        IncompatibleAdapter, UnsupportedFile: see updates.refuse_misfits.
        InvalidFile: a damaged checkpoint.
        EdgeLoRAError: unusable examples or options, a loss that is no number, or a checkpoint of
            another descent.
        Interrupted: Ctrl-C, or a KeyboardInterrupt of the listener.
    """
    options = options or DescentOptions()
    refuse_misfits(adapters, decoder.base)
    variables = _variables(adapters, start, options, passes or PassOptions(), prepare)
    work = _minimisation(decoder, adapters, examples, held_out, variables, options, passes)
    state, is_interrupted = work.run(work.open(checkpoint), listen, checkpoint)
    found = _found(state, variables, work.schedule)
    if is_interrupted:
        raise Interrupted(found)
    return found


def count_descent_tokens(
    decoder: Decoder,
    examples: Sequence[TokenisedExample],
    options: DescentOptions | None = None,
    passes: PassOptions | None = None,
    held_out: Sequence[TokenisedExample] = (),
) -> int:
    """Forward-equivalent tokens that `descend` computes at most."""
    options = options or DescentOptions()
    texts = objective_examples([*examples, *held_out], options.objective)
    schedule = _schedule(options, examples, held_out)
    return count_tokens(decoder, texts, schedule, passes or PassOptions())


def count_folds(examples: Sequence[TokenisedExample], options: DescentOptions) -> int:
    """Folds that a descent has: no more than there are prompts, and none of a single one."""
    n_folds = min(options.n_folds, len({example.prompt for example in examples}))
    return n_folds if n_folds > 1 else 0


def rank_adapters(
    decoder: Decoder,
    adapters: Sequence[LoraFile],
    examples: Sequence[TokenisedExample],
    at: Updates,
    *,
    passes: PassOptions | None = None,
) -> NDArray[np.float64]:
    """The slope of the loss along each whole adapter, (k,), by one gradient pass.

    More negative is better, as far as a slope tells.

    Args:
        at: where the slope is taken, {} for the base.

    Raises:
        IncompatibleAdapter, UnsupportedFile: see updates.refuse_misfits.
        EdgeLoRAError: unusable examples.
    """
    refuse_misfits(adapters, decoder.base)
    found = CoefficientGradients(adapters)
    decoder.gradients(examples, at, found, passes)
    return per_adapter(found.values)


def objective_examples(
    examples: Sequence[TokenisedExample], objective: str
) -> list[TokenisedExample]:
    """Examples whose completions are what the objective is about.

    Raises:
        EdgeLoRAError: an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise EdgeLoRAError(f"no objective {objective}", hint=f"One of {', '.join(OBJECTIVES)}.")
    if objective == "loss":
        return list(examples)
    if objective == "entropy":
        return [replace(example, completion=(0,)) for example in examples]
    cut = max(1, shared_prefix([example.prompt for example in examples]))
    return [
        replace(example, prompt=example.prompt[:cut], completion=example.prompt[cut:])
        for example in examples
    ]


def _variables(
    adapters: Sequence[LoraFile],
    start: NDArray[np.float64],
    options: DescentOptions,
    passes: PassOptions,
    prepare: Callable[[int, int], None],
) -> Combination:
    """What varies.

    Raises:
        EdgeLoRAError: no adapters, an unknown kind of weights, another number of them, or a
            sparsity that would not be one of coefficients.
    """
    if options.weights not in WEIGHTS:
        raise EdgeLoRAError(f"no weights for each {options.weights}", hint=f"One of {WEIGHTS}.")
    if not len(adapters) or start.shape != (len(adapters),):
        raise EdgeLoRAError(f"{len(adapters)} adapters and a start of shape {start.shape}")
    if options.weights != "component":
        return Coefficients(adapters, start, options.weights, passes.stack_bytes)
    if options.sparsity:
        raise EdgeLoRAError(
            "coefficients of components are moved together, none alone to zero",
            hint="Use sparsity with weights for tensors, layers or adapters.",
        )
    return Components(adapters, start, passes.scratch, prepare, passes.stack_bytes)


def _minimisation(
    decoder: Decoder,
    adapters: Sequence[LoraFile],
    examples: Sequence[TokenisedExample],
    held_out: Sequence[TokenisedExample],
    variables: Combination,
    options: DescentOptions,
    passes: PassOptions | None,
) -> Minimisation:
    texts = objective_examples([*examples, *held_out], options.objective)
    measure = layers.entropy if options.objective == "entropy" else layers.cross_entropy
    files = [(file.path.name, file.path.stat().st_size) for file in adapters]
    base = (decoder.base.identity.id, decoder.base.path.stat().st_size)
    course = replace(options, n_passes=0, patience=0, enough=0.0)  # they only say when it ends
    return Minimisation(
        decoder=decoder,
        variables=variables,
        examples=texts,
        adam=Adam(
            options.step,
            options.momentum,
            options.memory,
            options.penalty,
            options.sparsity,
            options.averaging,
        ),
        schedule=_schedule(options, examples, held_out),
        passes=replace(passes or PassOptions(), objective=measure),
        key=fingerprint("coefficients", base, files, texts, len(held_out), variables.start, course),
    )


def _schedule(
    options: DescentOptions,
    examples: Sequence[TokenisedExample],
    held_out: Sequence[TokenisedExample],
) -> Schedule:
    enough = options.enough * vouched_loss(held_out or examples)
    return Schedule(
        n_passes=options.n_passes,
        batch_size=options.batch_size,
        n_folds=0 if held_out else count_folds(examples, options),
        patience=options.patience,
        enough=enough if options.objective == "loss" else 0.0,
        seed=options.seed,
        prompts=tuple(example.prompt for example in (*examples, *held_out)),
        n_held_out=len(held_out),
    )


def _found(state: Checkpoint, variables: Combination, schedule: Schedule) -> Descended:
    tally, folds = state.tally, schedule.folds
    mean = np.mean(state.best, axis=0) if len(state.best) > 1 else state.best[0]
    return Descended(
        coefficients=variables.by_tensor(mean),
        n_passes=tally.best_pass,
        support_losses=tally.support_losses,
        held_out_losses=tally.held_out_losses,
        n_tokens=tally.n_tokens,
        folds=tuple(
            Crossed(variables.by_tensor(best), fold.held_out)
            for best, fold in zip(state.best, folds, strict=True)
            if schedule.n_folds
        ),
    )
