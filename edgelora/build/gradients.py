"""The base opened for gradients in a build: what is computed, its cost, a short test of speed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgelora.adapters.base import Base
from edgelora.adapters.gguf_lora import LoraFile, open_loras
from edgelora.adapters.lora import LoraPair
from edgelora.build.allowance import Allowance, count_others
from edgelora.build.records import GradientPlan, Options
from edgelora.build.reserving import FEWER_FOLDS, Reserved, Reserving
from edgelora.build.samples import held_out_of, learned_of
from edgelora.build.work import SHOWN, Parts, Work
from edgelora.engine.products import MAX_REPACKED_BYTES
from edgelora.engine.score import TokenisedExample
from edgelora.errors import UnsupportedFile
from edgelora.gradient import layers
from edgelora.gradient.components import memory_of_directions
from edgelora.gradient.decoder import Decoder, PassOptions, open_decoder
from edgelora.gradient.descent import (
    DescentOptions,
    count_folds,
    objective_examples,
    rank_adapters,
)
from edgelora.gradient.minimise import GRADIENT_COST
from edgelora.gradient.polish import PolishOptions, fresh_pairs
from edgelora.gradient.stacks import bytes_of_stacks
from edgelora.gradient.updates import Combined, refuse_misfits
from edgelora.memory import available_bytes

# In a larger bank only so many adapters are combined, those of the steepest slope at the base: the
# stacked factors of more would cost more than the base's own matrices.
MAX_SOURCES = 64
FRESH_RANK = 16
_SHARE_OF_FREE_MEMORY = 0.25
# For activations that need not be computed again; with more, 7B would gain little for its memory.
_KEEP_BYTES = 1 << 30
# For the bank's factors in float32, which each step uses: enough for dozens of adapters of a small
# base.
_STACK_BYTES = 256 << 20
_FLOAT = 4


@dataclass(frozen=True, eq=False)
class Gradients:
    """All that the steps of one build need.

    Attributes:
        adapters: the pool's files.
        examples: tokenised, at most MAX_EXAMPLES of the support part.
        held_out: others, which stop the descent; empty where it is cross-validated.
        polish: None without `--polish`.
        reserved: what the budget has set aside, and the descent.
    """

    decoder: Decoder
    adapters: list[LoraFile]
    examples: list[TokenisedExample]
    held_out: Sequence[TokenisedExample]
    passes: PassOptions
    polish: PolishOptions | None
    reserved: Reserved

    @property
    def descent(self) -> DescentOptions | None:
        """None without `--refine gradient`."""
        return self.reserved.descent

    @property
    def measured_passes(self) -> PassOptions:
        """The passes with the objective of the descent."""
        is_entropy = self.descent is not None and self.descent.objective == "entropy"
        return replace(
            self.passes, objective=layers.entropy if is_entropy else layers.cross_entropy
        )

    @property
    def objective_examples(self) -> list[TokenisedExample]:
        """The examples with completions that the objective is about."""
        return _texts(self.examples, self.descent)


@dataclass(frozen=True, eq=False)
class Opened:
    """The base and the pool's adapters, opened for passes in numpy."""

    decoder: Decoder
    adapters: list[LoraFile]

    @property
    def is_large(self) -> bool:
        """Whether not all of the adapters take part in a descent."""
        return len(self.adapters) > MAX_SOURCES


def open_gradients(
    work: Work,
    support: Sequence[TokenisedExample],
    scratch: Path,
    has_completions: bool,
    *,
    opened: Opened | None = None,
    seconds: float = math.inf,
    is_crossed: bool = False,
    held_out: Sequence[TokenisedExample] = (),
) -> Gradients:
    """Open the base, test its speed, reserve what the passes cost and put that in `work`.

    Args:
        scratch: a folder that is made if the blocks' inputs do not fit the memory.
        opened: what is open already.
        seconds: that all passes may take, forward ones too; a descent takes one at least.
        is_crossed: whether candidates are cross-validated: then they are tried on all examples.
        held_out: see Gradients.

    Raises:
        UnsupportedFile: a base, or an adapter, whose gradient is not known; it is named.
        EdgeLoRAError: texts that are too long, or a budget too small for one pass.
    """
    options = work.options
    opened = opened or open_decoder_and_adapters(
        work, "Use --refine forward without --polish: it needs no gradients."
    )
    decoder, files = opened.decoder, opened.adapters
    examples = learned_of(work, support)
    descent = _descent_options(options, has_completions)
    polish = _polish_options(options)
    texts = _texts(examples, descent)
    memory, passes = _memory(work, decoder, texts, files, scratch)
    began_s = work.clock.elapsed_s
    speed = _test_speed(work, decoder, texts, files, passes)
    seconds -= work.clock.elapsed_s - began_s
    reserving = Reserving(decoder, examples, passes, opened.is_large, is_crossed, held_out)
    reserved = reserving.reserve(Allowance(work, examples, seconds, speed), descent, polish)
    descent = reserved.descent
    work.gradient = GradientPlan(
        n_examples=len(examples),
        n_rows=decoder.count_rows(texts, passes),
        n_passes=descent.n_passes if descent else 0,
        n_folds=count_folds(examples, descent) if descent and not held_out else 0,
        n_held_out=len(held_out) if descent else 0,
        n_polish=options.polish,
        n_tokens=reserved.n_descent_tokens + reserved.n_polish_tokens,
        tokens_per_s=speed,
        memory_bytes=memory,
        on_disk=passes.scratch is not None,
    )
    return Gradients(decoder, files, examples, held_out, passes, polish, reserved)


@contextlib.contextmanager
def threads(work: Work) -> Iterator[None]:
    """BLAS on as many threads as llama.cpp has."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(work.model.options.threads(), user_api="blas"):
        yield


def make_fresh_pairs(work: Work, gradients: Gradients) -> dict[str, LoraPair]:
    """Untrained factors of the modules that the bank's adapters update."""
    rank = work.options.rank
    names = {name for file in gradients.adapters for name in file.plan if name.startswith("blk.")}
    modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})
    return fresh_pairs(
        gradients.decoder.base,
        rank if isinstance(rank, int) else FRESH_RANK,
        modules,
        seed=work.options.seed,
    )


def open_decoder_and_adapters(work: Work, hint: str) -> Opened:
    """The base and the pool's adapters.

    Args:
        hint: what to do where they cannot be.

    Raises:
        UnsupportedFile: a base, or an adapter, whose passes are not known; it is named.
    """
    files = open_loras(work.pool.paths)
    try:
        n_threads = work.model.options.threads()
        with threads(work):
            decoder = open_decoder(work.model.base.path, n_threads=n_threads, exact=False)
        refuse_misfits(files, decoder.base)
    except UnsupportedFile as error:
        raise UnsupportedFile(error.what, problems=error.problems, hint=hint) from error
    return Opened(decoder, files)


def count_first_pass(work: Work, opened: Opened, parts: Parts) -> tuple[int, int]:
    """Tokens of gradients, and of other candidates, where the descent on losses has one pass.

    The test of speed before it is counted, comparisons are not.
    """
    options, examples = work.options, learned_of(work, parts.support)
    descent = DescentOptions(seed=options.seed, n_folds=FEWER_FOLDS)
    polish = _polish_options(options)
    reserving = Reserving(
        opened.decoder, examples, PassOptions(), opened.is_large, parts.is_crossed,
        held_out_of(work, parts),
    )  # fmt: skip
    n_tokens = reserving.count(descent).of(1, is_ranked=opened.is_large)
    n_tokens += reserving.count_polish(polish, descent)
    n_tokens += GRADIENT_COST * opened.decoder.count_rows(timed_step(examples), PassOptions())
    return n_tokens, count_others(work, examples, SHOWN[0 if parts.is_crossed else -1])


def timed_step(texts: Sequence[TokenisedExample]) -> list[TokenisedExample]:
    """The step of a descent that tests of speed take: of the shortest texts."""
    return sorted(texts, key=lambda text: text.n_tokens)[: DescentOptions().batch_size]


def _texts(
    examples: Sequence[TokenisedExample], descent: DescentOptions | None
) -> list[TokenisedExample]:
    return objective_examples(examples, descent.objective if descent else "loss")


def _polish_options(options: Options) -> PolishOptions | None:
    if not options.polish:
        return None
    return PolishOptions(n_passes=options.polish, seed=options.seed)


def _descent_options(options: Options, has_completions: bool) -> DescentOptions | None:
    if options.refine != "gradient":
        return None
    return DescentOptions(
        weights=options.weights,
        n_passes=options.passes,
        seed=options.seed,
        objective=options.objective or ("loss" if has_completions else "prompts"),
    )


def _test_speed(
    work: Work,
    decoder: Decoder,
    texts: Sequence[TokenisedExample],
    files: Sequence[LoraFile],
    passes: PassOptions,
) -> float:
    """Forward-equivalent tokens a second of one step, with adapters applied."""
    is_many = work.options.refine == "gradient"
    used = list(files[:MAX_SOURCES] if is_many else files[:2])
    names = {name for file in used for name in file.plan}
    at = Combined(used, dict.fromkeys(names, [1 / len(used)] * len(used)))
    step = timed_step(texts)
    n_tokens = GRADIENT_COST * decoder.count_rows(step, passes)
    work.spend(n_tokens, "a test of speed", at_once=True)
    work.listener.progress("testing the speed of gradients", 0, 1)
    started = time.perf_counter()
    with threads(work):
        rank_adapters(decoder, used, step, at, passes=passes)
    work.listener.progress("testing the speed of gradients", 1, 1)
    return n_tokens / (time.perf_counter() - started)


def _memory(
    work: Work,
    decoder: Decoder,
    texts: Sequence[TokenisedExample],
    files: Sequence[LoraFile],
    scratch: Path,
) -> tuple[int, PassOptions]:
    """An estimate of what a pass takes, and how it is run so that the memory suffices."""
    base, passes = decoder.base, PassOptions()
    longest = max(text.n_tokens for text in texts)
    n_rows = min(decoder.count_rows(texts, passes), max(passes.max_tokens, longest))
    inputs = base.n_layer * n_rows * base.n_embd * _FLOAT
    room = int(_SHARE_OF_FREE_MEMORY * available_bytes()) - inputs
    # A bank is ranked in groups whose stacks are no larger than those of its sources.
    transient = _transient(decoder, n_rows, longest, files[:MAX_SOURCES])
    if work.options.refine == "gradient" and work.options.weights == "component":
        transient += memory_of_directions(files[:MAX_SOURCES])
    if room < 0:
        scratch.mkdir(parents=True, exist_ok=True)
        return transient, replace(passes, scratch=scratch)
    if work.model.options.low_ram:
        return inputs + transient, passes
    stacks = bytes_of_stacks(files[:MAX_SOURCES]) if work.options.refine == "gradient" else 0
    stacks = stacks if stacks <= min(room, _STACK_BYTES) else 0
    keep = min(room - stacks, _KEEP_BYTES)
    activations = base.n_layer * n_rows * _activations_of_a_row(decoder)
    kept = min(keep, activations) + stacks
    return inputs + transient + kept, replace(passes, keep_bytes=keep, stack_bytes=stacks)


def _activations_of_a_row(decoder: Decoder) -> int:
    """Bytes of one block's activations; see gradient.block.Activations."""
    base = decoder.base
    heads = 3 * (base.n_head + base.n_head_kv) * base.head_dim
    return _FLOAT * (4 * base.n_embd + heads + 2 * _feed_forward(base))


def _feed_forward(base: Base) -> int:
    return max(shape[0] for name, shape in base.shapes.items() if "ffn_up" in name)


def _transient(decoder: Decoder, n_rows: int, longest: int, files: Sequence[LoraFile]) -> int:
    """One block's arrays, a tile of weights, logits, the stacked factors of one tensor, and what
    ggml's kernels take: rounded rows, and repacked blocks of at most 8 bits a weight."""
    base = decoder.base
    n_ff = _feed_forward(base)
    of_block = n_rows * (12 * base.n_embd + 6 * n_ff) + 3 * base.n_head * longest**2
    tile = max(4 << 20, n_ff)
    logits = 3 * min(16 << 20, n_rows * base.n_vocab)
    stacked = max(
        (sum(f.plan[name].rank * math.fsum((f.plan[name].n_in, f.plan[name].n_out))
             for f in files if name in f.plan)
         for name in {name for file in files for name in file.plan}),
        default=0.0,
    )  # fmt: skip
    of_kernels = n_rows * n_ff + min(MAX_REPACKED_BYTES, n_ff * base.n_embd)
    return _FLOAT * int(of_block + tile + logits + 3 * np.ceil(stacked)) + of_kernels
