"""The factors of one adapter by gradient descent: LoRA fine-tuning through a quantised base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgelora.adapters.base import Base
from edgelora.adapters.lora import LoraPair, find_mismatches
from edgelora.engine.score import TokenisedExample
from edgelora.errors import EdgeLoRAError, IncompatibleAdapter
from edgelora.gradient.adam import Adam
from edgelora.gradient.checkpoint import Checkpoint, fingerprint
from edgelora.gradient.decoder import Decoder, PassOptions
from edgelora.gradient.minimise import Interrupted, Minimisation, Schedule, Step, count_tokens
from edgelora.gradient.variables import Factors


@dataclass(frozen=True)
class PolishOptions:
    """How factors are trained; the defaults are the best of docs/gradient.md.

    Attributes:
        n_passes: over the examples, at most.
        batch_size: examples a step; 0 for all.
        step, momentum, memory, penalty, averaging: see adam.Adam.
    """

    n_passes: int = 10
    batch_size: int = 2
    step: float = 0.002
    penalty: float = 0.0
    seed: int = 0
    momentum: float = 0.9
    memory: float = 0.99
    averaging: float = 0.8


@dataclass(frozen=True, eq=False)
class Polished:
    """What training found.

    Attributes:
        pairs: by the name of their tensor; float32 factors, scales as they were.
        n_passes: passes that were finished.
        support_losses: nats a token in each pass, met before each step.
        n_tokens: forward-equivalent tokens that were computed; a gradient pass counts three.
    """

    pairs: dict[str, LoraPair]
    n_passes: int
    support_losses: tuple[float, ...]
    n_tokens: int


def polish(
    decoder: Decoder,
    pairs: Mapping[str, LoraPair],
    examples: Sequence[TokenisedExample],
    options: PolishOptions | None = None,
    *,
    passes: PassOptions | None = None,
    listen: Callable[[Step], None] = lambda step: None,
    checkpoint: Path | None = None,
) -> Polished:
    """Adam on the factors of one adapter, all passes, without early stopping.

    The same inputs give the same factors, also when it was interrupted and goes on. Memory holds
    the factors in float32 about seven times.

    Args:
        pairs: an adapter's, by the name of their tensor, or `fresh_pairs`.
        checkpoint: where the state is kept; see descent.descend.

    Raises:
        IncompatibleAdapter: pairs that do not fit the base.
        InvalidFile: a damaged checkpoint.
        EdgeLoRAError: unusable examples, a loss that is no number, or another's checkpoint.
        Interrupted: Ctrl-C, or a KeyboardInterrupt of the listener.
    """
    options = options or PolishOptions()
    _refuse_misfits(pairs, decoder.base)
    variables = Factors(pairs)
    work = _minimisation(decoder, pairs, examples, variables, options, passes or PassOptions())
    state, is_interrupted = work.run(work.open(checkpoint), listen, checkpoint)
    found = _found(state, variables)
    if is_interrupted:
        raise Interrupted(found)
    return found


def count_polish_tokens(
    decoder: Decoder,
    examples: Sequence[TokenisedExample],
    options: PolishOptions | None = None,
    passes: PassOptions | None = None,
) -> int:
    """Forward-equivalent tokens that `polish` computes."""
    schedule = _schedule(options or PolishOptions(), examples)
    return count_tokens(decoder, examples, schedule, passes or PassOptions())


def fresh_pairs(
    base: Base, rank: int, modules: Sequence[str], *, alpha: float | None = None, seed: int = 0
) -> dict[str, LoraPair]:
    """Factors of an untrained LoRA: lora_b is zero, lora_a uniform within 1 / sqrt(in) (as PEFT's).

    Args:
        modules: parts of names, e.g. attn_q: of `blk.0.attn_q.weight`, in every block.
        alpha: the scale is alpha / rank; twice the rank if None.

    Raises:
        EdgeLoRAError: a rank below 1, or a module that the base does not have.
    """
    if rank < 1:
        raise EdgeLoRAError(f"rank {rank}: a whole number from 1")
    parts = {name: name.removesuffix(".weight").rpartition(".")[2] for name in base.shapes}
    if unknown := sorted(set(modules) - set(parts.values())):
        raise EdgeLoRAError(f"{base.path}: no tensors are named {', '.join(unknown)}")
    made = {}
    rng = np.random.default_rng(seed)
    for name, part in parts.items():
        if part in modules and name.startswith("blk."):
            n_out, n_in = base.shapes[name]
            lora_a = rng.uniform(-1, 1, (rank, n_in)).astype(np.float32) / np.float32(n_in**0.5)
            scale = (2.0 * rank if alpha is None else alpha) / rank
            made[name] = LoraPair(name, lora_a, np.zeros((n_out, rank), np.float32), scale)
    return made


def _refuse_misfits(pairs: Mapping[str, LoraPair], base: Base) -> None:
    problems = [p for pair in pairs.values() for p in find_mismatches(pair, base.shapes)]
    if problems:
        raise IncompatibleAdapter(
            f"an adapter that does not fit {base.path.name}", problems=problems[:20]
        )


def _minimisation(
    decoder: Decoder,
    pairs: Mapping[str, LoraPair],
    examples: Sequence[TokenisedExample],
    variables: Factors,
    options: PolishOptions,
    passes: PassOptions,
) -> Minimisation:
    base = (decoder.base.identity.id, decoder.base.path.stat().st_size)
    course = replace(options, n_passes=0)  # it only says when it ends
    scales = {name: pair.scale for name, pair in pairs.items()}
    return Minimisation(
        decoder=decoder,
        variables=variables,
        examples=examples,
        adam=Adam(
            options.step,
            options.momentum,
            options.memory,
            options.penalty,
            averaging=options.averaging,
        ),
        schedule=_schedule(options, examples),
        passes=passes,
        key=fingerprint("factors", base, scales, tuple(examples), variables.start, course),
    )


def _schedule(options: PolishOptions, examples: Sequence[TokenisedExample]) -> Schedule:
    prompts = tuple(example.prompt for example in examples)
    return Schedule(options.n_passes, options.batch_size, 0, 0, options.seed, prompts)


def _found(state: Checkpoint, variables: Factors) -> Polished:
    return Polished(
        pairs=variables.updates(state.best[0]),
        n_passes=state.tally.best_pass,
        support_losses=state.tally.support_losses,
        n_tokens=state.tally.n_tokens,
    )
