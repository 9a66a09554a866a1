"""One case, arm by arm: made, scored by llama.cpp on the test items, kept as a line of results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from result_lines import Row, read_lines

from edgelora import metrics
from edgelora.engine.context import open_context
from edgelora.engine.score import Score, mean_loss, score
from edgelora.evaluate import references
from gradient_quality.arms import Bench, Made, parse_arm
from gradient_quality.bed import Case

# Arms that do not depend on the number of labels are measured once.
WITHOUT_LABELS = ("base", "own")
_WHOLE = {"bed", "task", "seed", "labels", "arm"}
Key = tuple[str, str, int, int, str]


def key_of(row: Row) -> Key:
    """What a line is about."""
    return (row["bed"], row["task"], row["seed"], row["labels"], row["arm"])


def labels_of(arm: str, n_labels: int) -> int:
    """The number of labels that a line of this arm carries."""
    return 0 if arm in WITHOUT_LABELS else n_labels


def measure_case(
    case: Case,
    arms: Sequence[str],
    folder: Path,
    *,
    exact: bool,
    n_labels: int,
    facts: Row,
) -> Iterator[Row]:
    """A line of results for each arm, as it is finished.

    Args:
        exact: whether answers are generated.
        folder: of this case only; kept, it lets a descent go on where it was stopped.
        facts: what every line says besides.
    """
    model = case.bed.model
    with open_context(model, n_ctx=2048) as context:
        bench = Bench(case, context, folder)
        for arm in arms:
            started = time.process_time()
            made = parse_arm(arm)(bench)
            cpu_s = time.process_time() - started
            scores = _score(bench, made, exact)
            yield {
                "bed": case.bed.name,
                "task": case.task,
                "source": sorted(case.bed.source(case.task)),
                "seed": case.seed,
                "labels": labels_of(arm, n_labels),
                "arm": arm,
                "loss": round(mean_loss(scores), 5),
                "exact": _exact_match(case, scores) if exact else None,
                "nll": [round(s.nll, 4) for s in scores],
                "n_tokens": [s.n_tokens for s in scores],
                "tokens": made.n_tokens,
                "cpu_s": round(cpu_s, 1),
                **made.facts,
                **facts,
            }


def _score(bench: Bench, made: Made, with_answers: bool) -> list[Score]:
    """Losses, and greedy answers no longer than the longest right one could be."""
    texts = bench.case.test_texts
    longest = max(len(text.completion) for text in texts) + 2
    bench.context.apply(made.adapters)
    scores = score(bench.context, texts, max_answer=longest if with_answers else 0)
    bench.context.apply([])
    for adapter in made.adapters:
        bench.case.bed.model.unload(adapter.path)
    return scores


def _exact_match(case: Case, scores: Sequence[Score]) -> float:
    vocabulary = case.bed.model.vocabulary
    right = [
        metrics.exact_match(
            vocabulary.decode(scored.answer).decode("utf-8", "replace"), references(example)
        )
        for scored, example in zip(scores, case.test, strict=True)
    ]
    return round(sum(right) / len(right), 4)


def read_results(path: Path) -> dict[Key, Row]:
    """The finished lines; one that a killed run left half-written is not counted."""
    return {key_of(row): row for row in read_lines(path) if _WHOLE <= row.keys()}
