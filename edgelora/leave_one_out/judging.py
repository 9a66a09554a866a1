"""How good one set of adapters is on test lines: loss, exact match, ROUGE-L, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelora import metrics
from edgelora.datasets.records import Example
from edgelora.engine.context import Context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import Score, TokenisedExample, mean_loss, score
from edgelora.evaluate import references


@dataclass(frozen=True)
class Judged:
    """What adapters made of n lines.

    Attributes:
        scores: of each line.
        answers: the greedy answer to each; () if none were asked for.
        exact, rouge: of each answer, the best of its references; () without answers.
    """

    scores: tuple[Score, ...]
    answers: tuple[str, ...] = ()
    exact: tuple[bool, ...] = ()
    rouge: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Nats for each completion token."""
        return mean_loss(self.scores)

    @property
    def exact_match(self) -> float | None:
        """The share of lines answered exactly; None without answers."""
        return float(np.mean(self.exact)) if self.exact else None

    @property
    def rouge_l(self) -> float | None:
        """Mean ROUGE-L F1; None without answers."""
        return float(np.mean(self.rouge)) if self.rouge else None


def judge(
    context: Context,
    adapters: Sequence[WeightedAdapter],
    texts: Sequence[TokenisedExample],
    examples: Sequence[Example],
    *,
    with_answers: bool,
) -> Judged:
    """Score `texts` under `adapters`, which are applied for it and unloaded afterwards.

    Greedy answers are no longer than the longest right one could be (two tokens more).

    Args:
        texts: of `examples`, in their order.

    Raises:
        EngineError: a text is longer than the context.
    """
    longest = max(len(text.completion) for text in texts) + 2
    context.apply(adapters)
    try:
        scores = score(context, texts, max_answer=longest if with_answers else 0)
    finally:
        context.apply([])
        for adapter in adapters:
            context.model.unload(adapter.path)
    if not with_answers:
        return Judged(tuple(scores))
    decode = context.model.vocabulary.decode
    answers = tuple(decode(s.answer).decode("utf-8", "replace") for s in scores)
    pairs = [(a, references(e)) for a, e in zip(answers, examples, strict=True)]
    return Judged(
        tuple(scores),
        answers,
        tuple(metrics.exact_match(*pair) for pair in pairs),
        tuple(metrics.rouge_l(*pair) for pair in pairs),
    )


def context_size(texts: Sequence[TokenisedExample], usual: int = 2048) -> int:
    """Room for the longest of `texts` with its answer, and for several at once."""
    longest = max(len(text.completion) for text in texts) + 2
    return max(usual, *(len(text.prompt) + longest for text in texts))
