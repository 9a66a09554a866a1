"""A base as a function of its adapters: the loss of examples, and the gradients of that loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.adapters.architectures import EMBEDDING
from edgelora.adapters.base import Base, read_base
from edgelora.engine.score import Score, TokenisedExample
from edgelora.gguf_file import open_gguf
from edgelora.gradient import layers
from edgelora.gradient.block import Activations, Block, Linears, Rows
from edgelora.gradient.head import Head, Objective
from edgelora.gradient.hyperparameters import (
    ROPE_FACTORS,
    Hyperparameters,
    read_hyperparameters,
    rope_angles,
)
from edgelora.gradient.kept import make_stack
from edgelora.gradient.kernels import Kernels
from edgelora.gradient.observers import Observer
from edgelora.gradient.packing import Pack, packs, refuse_unusable
from edgelora.gradient.updates import Updates
from edgelora.gradient.weights import Array, Weights

Progress = Callable[[int], None]
# Shown the rows of a pass, the name of a matrix and its input (t, in).
Watch = Callable[[Pack, str, Array], None]


@dataclass(frozen=True)
class PassOptions:
    """How a pass is run.

    Attributes:
        max_tokens: rows that are computed together; memory grows with them.
        share: compute the prefix that all prompts begin with once for each pack.
        scratch: a folder for a temporary file that keeps the blocks' inputs; None keeps them in
            memory (n_layer x rows x d values).
        keep_bytes: for whole activations. As many of the last blocks as fit keep theirs; the others
            are computed again from their inputs on the way back, half as much again in all.
        stack_bytes: for the factors of a bank, stacked and in float32: they are kept for the whole
            descent if all of them fit.
        objective: what is minimised: layers.cross_entropy, or layers.entropy for texts without
            answers (give each any one token as its completion).
    """

    max_tokens: int = 1024
    share: bool = True
    scratch: Path | None = None
    keep_bytes: int = 0
    stack_bytes: int = 0
    objective: Objective = layers.cross_entropy


class Decoder:
    """A llama, qwen2 or qwen3 base whose weights stay in their file.

    Where weights are so large that values overflow, losses are not finite and nothing is warned.
    """

    def __init__(self, base: Base, model: Hyperparameters, weights: Weights) -> None:
        self.base = base
        self.model = model
        self.weights = weights

    def logits(self, ids: Sequence[int], updates: Updates) -> Array:
        """What follows each token of one text, (n tokens, vocabulary), for comparisons.

        Raises:
            EdgeLoRAError: a text that is empty, too long or outside the vocabulary.
        """
        text = TokenisedExample(tuple(ids[:1]), (*ids[1:], 0))  # every token predicts one
        (pack,) = self._packs([text], PassOptions(max_tokens=len(ids)))
        linears = Linears(self.weights, updates)
        return Head(linears, self.model).logits(self._hidden(pack, linears, lambda n_blocks: None))

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def losses(
        self,
        examples: Sequence[TokenisedExample],
        updates: Updates,
        options: PassOptions | None = None,
        progress: Progress = lambda n_blocks: None,
    ) -> list[Score]:
        """The objective of each example, summed over its completion; a forward only.

        Args:
            updates: the adapters' part of each matrix, {} for the base.
            progress: called with 1 after each block.

        Raises:
            EdgeLoRAError: examples that are empty, too long or outside the vocabulary.
        """
        options = options or PassOptions()
        values = np.zeros(len(examples))
        for pack in self._packs(examples, options):
            linears = Linears(self.weights, updates)
            x = self._hidden(pack, linears, progress)[pack.outputs]
            losses = Head(linears, self.model).losses(x, pack.targets, options.objective)
            np.add.at(values, pack.owners, losses)
        return _scores(values, examples)

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def gradients(
        self,
        examples: Sequence[TokenisedExample],
        updates: Updates,
        observe: Observer,
        options: PassOptions | None = None,
        progress: Progress = lambda n_blocks: None,
    ) -> list[Score]:
        """One gradient pass: forward, and back through every matrix, which `observe` is shown.

        What it is shown belongs to the mean over all completion tokens, `mean_loss(result)`.

        Args:
            progress: called with 1 after each block, three times a block in all.

        Returns:
            the same as `losses`.

        Raises:
            EdgeLoRAError: examples that are empty, too long or outside the vocabulary.
        """
        options = options or PassOptions()
        values = np.zeros(len(examples))
        weight = 1 / max(1, sum(len(example.completion) for example in examples))
        for pack in self._packs(examples, options):
            losses = self._forward_backward(pack, updates, observe, options, weight, progress)
            np.add.at(values, pack.owners, losses)
        return _scores(values, examples)

    def watch(
        self,
        examples: Sequence[TokenisedExample],
        updates: Updates,
        seen: Watch,
        options: PassOptions | None = None,
        progress: Progress = lambda n_blocks: None,
    ) -> None:
        """A forward pass in which `seen` is shown the input of every matrix of the blocks.

        Args:
            progress: called with 1 after each block.

        Raises:
            EdgeLoRAError: examples that are empty, too long or outside the vocabulary.
        """
        for pack in self._packs(examples, options or PassOptions()):
            linears = Linears(self.weights, updates, partial(seen, pack))
            self._hidden(pack, linears, progress)

    def count_packs(self, examples: Sequence[TokenisedExample], options: PassOptions) -> int:
        """Stretches of rows that one pass computes one after the other."""
        return len(self._packs(examples, options))

    def count_rows(self, examples: Sequence[TokenisedExample], options: PassOptions) -> int:
        """Rows of tokens that one pass computes."""
        return sum(len(pack.tokens) for pack in self._packs(examples, options))

    def _hidden(self, pack: Pack, linears: Linears, progress: Progress) -> Array:
        x = self.weights.embed(EMBEDDING, pack.tokens)
        for block in self._blocks(pack, linears):
            x = block.output(block.activations(x))
            progress(1)
        return x

    def _forward_backward(
        self,
        pack: Pack,
        updates: Updates,
        observe: Observer,
        options: PassOptions,
        weight: float,
        progress: Progress,
    ) -> Array:
        linears = Linears(self.weights, updates)
        blocks = self._blocks(pack, linears)
        x = self.weights.embed(EMBEDDING, pack.tokens)
        kept: list[Activations] = []
        inputs = make_stack(options.scratch, len(blocks), x)
        for number, block in enumerate(blocks):
            made = block.activations(x)
            if len(blocks) - number <= options.keep_bytes // made.nbytes:
                kept.append(made)
            else:
                inputs.append(x)
            x = block.output(made)
            del made
            progress(1)
        d_x = np.zeros_like(x)
        losses, d_x[pack.outputs] = Head(linears, self.model).gradients(
            x[pack.outputs], pack.targets, options.objective, weight, observe
        )
        for block in reversed(blocks):
            made = kept.pop() if kept else block.activations(inputs.pop())
            d_x = block.backward(d_x, made, observe)
            del made
            progress(2)
        return losses

    def _packs(self, examples: Sequence[TokenisedExample], options: PassOptions) -> Sequence[Pack]:
        longest = min(self.model.n_ctx, self.model.window or self.model.n_ctx)
        refuse_unusable(examples, self.model.n_vocab, longest)
        return list(packs(examples, max_tokens=options.max_tokens, share=options.share))

    def _blocks(self, pack: Pack, linears: Linears) -> list[Block]:
        factors = self.weights.vector(ROPE_FACTORS) if ROPE_FACTORS in self.weights else None
        angles = rope_angles(self.model, pack.positions, factors)
        cos, sin = (part.astype(self.weights.dtype) for part in angles)
        rows = Rows(pack.spans, cos, sin)
        return [Block(i, linears, self.model, rows) for i in range(self.model.n_layer)]


def open_decoder(
    path: Path,
    dtype: type[np.floating[Any]] = np.float32,
    *,
    n_threads: int = 1,
    exact: bool = True,
) -> Decoder:
    """A base to derive: only its header is read.

    Args:
        dtype: in which all is computed: float32 to work, float64 to test.
        n_threads: for dequantising, and for ggml's kernels; BLAS has its own.
        exact: all products in `dtype`. Else those of the way forward by ggml's kernels where these
            are faster here, on rows rounded as llama.cpp rounds them: see gradient/kernels.py.

    Raises:
        NotFound, InvalidFile: no sound GGUF of a language model.
        UnsupportedFile: a model that is not known to be computed exactly; what is unknown is named.
    """
    base = read_base(path)
    gguf = open_gguf(path)
    kernels = None if exact else Kernels(n_threads)
    weights = Weights(gguf, dtype, n_threads=n_threads, kernels=kernels)
    return Decoder(base, read_hyperparameters(base, gguf), weights)


def _scores(values: Array, examples: Sequence[TokenisedExample]) -> list[Score]:
    return [
        Score(float(value), len(example.completion))
        for value, example in zip(values, examples, strict=True)
    ]
