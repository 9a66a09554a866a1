"""The base and adapters side by side on one dataset: loss, ROUGE-L, exact match, intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edgelora import metrics
from edgelora.datasets.read import Example
from edgelora.datasets.template import Template
from edgelora.engine.context import Context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.prepare import tokenise_examples
from edgelora.engine.score import Score, mean_loss, paired_interval, score
from edgelora.errors import DatasetError


@dataclass(frozen=True)
class Arm:
    """One row of an evaluation.

    Attributes:
        name: "base", or the adapter's path as it was given.
        loss: nats for each completion token, the end token included.
        n_tokens: completion tokens scored.
        rouge_l: mean ROUGE-L F1 of greedy answers, the best reference each; None without answers.
        exact_match: share of answers equal to a reference after folding; None without answers.
        loss_vs_base: (low, mid, high) of the paired bootstrap of loss - base's loss, 95 %.
    """

    name: str
    loss: float
    n_tokens: int
    rouge_l: float | None
    exact_match: float | None
    loss_vs_base: tuple[float, float, float] | None


@dataclass(frozen=True)
class Evaluation:
    """All arms over the same examples."""

    data: str
    examples: int
    arms: tuple[Arm, ...]
    answers: tuple[tuple[str, ...], ...] = ()

    def as_json(self) -> dict[str, object]:
        """The documented form of `edgelora eval --json`."""
        arms = [asdict(arm) for arm in self.arms]
        return {"data": self.data, "examples": self.examples, "arms": arms}


def evaluate(
    context: Context,
    template: Template,
    examples: Sequence[Example],
    adapters: Sequence[Path],
    *,
    data: str,
    generate: bool = True,
    max_answer: int = 48,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n_examples: None,
) -> Evaluation:
    """Score the base, then each adapter, with the same engine, file, template and examples.

    Raises:
        DatasetError: no example has a completion to compare with.
    """
    usable = [example for example in examples if example.completion is not None]
    if not usable:
        raise DatasetError(
            f"{data}: no line has a completion",
            hint="eval compares with completions; use a dataset that has them.",
        )
    tokenised = tokenise_examples(context.model, template, usable)
    arms: list[Arm] = []
    answers: list[tuple[str, ...]] = []
    base_scores: list[Score] = []
    for path in (None, *adapters):
        context.apply([WeightedAdapter(path)] if path else [])
        scores = score(
            context, tokenised, max_answer=max_answer if generate else 0, progress=progress
        )
        base_scores = base_scores or scores
        texts = tuple(_text(context, s) for s in scores) if generate else ()
        answers.append(texts)
        arms.append(_arm(str(path or "base"), scores, base_scores, usable, texts, seed))
    return Evaluation(data, len(usable), tuple(arms), tuple(answers))


def _arm(
    name: str,
    scores: Sequence[Score],
    base: Sequence[Score],
    examples: Sequence[Example],
    answers: Sequence[str],
    seed: int,
) -> Arm:
    interval = None
    if name != "base":
        interval = paired_interval(scores, base, seed)
    rouge = exact = None
    if answers:
        pairs = list(zip(answers, examples, strict=True))
        rouge = float(np.mean([metrics.rouge_l(text, references(e)) for text, e in pairs]))
        exact = float(np.mean([metrics.exact_match(text, references(e)) for text, e in pairs]))
    n_tokens = sum(s.n_tokens for s in scores)
    return Arm(name, mean_loss(scores), n_tokens, rouge, exact, interval)


def references(example: Example) -> tuple[str, ...]:
    """The acceptable answers: the references of the line, or its completion."""
    return example.references or ((example.completion,) if example.completion is not None else ())


def _text(context: Context, scored: Score) -> str:
    return context.model.vocabulary.decode(scored.answer).decode("utf-8", "replace")
