"""Examples to packs: rows of tokens without padding, a prefix that all share computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.score import TokenisedExample, shared_prefix
from edgelora.errors import EdgeLoRAError
from edgelora.gradient.attention import Span


@dataclass(frozen=True, eq=False)
class Pack:
    """t rows, of which n predict a completion token.

    Attributes:
        tokens, positions: (t,) int64.
        spans: the shared prefix, if there is one, and each example's own rows.
        outputs: (n,) int64, the rows that predict; targets: (n,) int64, the tokens they should.
        owners: (n,) int64, the example (its place in the list that was packed) of each.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    spans: tuple[Span, ...]
    outputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    owners: NDArray[np.int64]


def packs(
    examples: Sequence[TokenisedExample], *, max_tokens: int, share: bool = True
) -> Iterator[Pack]:
    """Consecutive examples in packs of at most `max_tokens` rows (or one example).

    The last token of a completion predicts nothing, so it gets no row.

    Args:
        share: compute the prefix that all prompts begin with once for each pack.
    """
    group: list[int] = []
    n_shared = shared_prefix([example.prompt for example in examples]) if share else 0
    used = n_shared
    for index, example in enumerate(examples):
        n_rows = example.n_tokens - 1 - n_shared
        if group and used + n_rows > max_tokens:
            yield _pack(examples, group, n_shared)
            group, used = [], n_shared
        group.append(index)
        used += n_rows
    if group:
        yield _pack(examples, group, n_shared)


def refuse_unusable(examples: Sequence[TokenisedExample], n_vocab: int, longest: int) -> None:
    """Raise EdgeLoRAError with the lines that cannot be computed.

    Args:
        longest: tokens that a text may have.
    """
    problems = []
    for example in examples:
        ids = example.prompt + example.completion
        if not example.prompt or not example.completion:
            problems.append(f"line {example.line}: an empty prompt or no completion")
        elif not all(0 <= token < n_vocab for token in ids):
            problems.append(f"line {example.line}: a token outside the vocabulary of {n_vocab}")
        elif len(ids) > longest:
            problems.append(f"line {example.line}: {len(ids)} tokens, at most {longest} are exact")
    if problems or not examples:
        raise EdgeLoRAError("examples without a gradient", problems=problems or ["none given"])


def _pack(examples: Sequence[TokenisedExample], group: Sequence[int], n_shared: int) -> Pack:
    tokens = list(examples[group[0]].prompt[:n_shared])
    positions = list(range(n_shared))
    spans = [Span(0, n_shared)] if n_shared else []
    outputs: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for index in group:
        example = examples[index]
        ids = (example.prompt + example.completion)[n_shared:-1]
        start = len(tokens)
        first = start + len(example.prompt) - 1 - n_shared
        spans.append(Span(start, start + len(ids), n_shared))
        tokens += ids
        positions += range(n_shared, n_shared + len(ids))
        outputs += range(first, first + len(example.completion))
        targets += example.completion
        owners += [index] * len(example.completion)
    rows = (np.array(column, np.int64) for column in (outputs, targets, owners))
    return Pack(np.array(tokens, np.int64), np.array(positions, np.int64), tuple(spans), *rows)
