"""One case, arm by arm: made, scored by llama.cpp on the test items, kept as a line of results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from result_lines import Row, read_lines

from edgelora.engine.context import open_context
from edgelora.leave_one_out.judging import judge
from gradient_quality.arms import Bench, parse_arm
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
            judged = judge(context, made.adapters, case.test_texts, case.test, with_answers=exact)
            yield {
                "bed": case.bed.name,
                "task": case.task,
                "source": sorted(case.bed.source(case.task)),
                "seed": case.seed,
                "labels": labels_of(arm, n_labels),
                "arm": arm,
                "loss": round(judged.loss, 5),
                "exact": None if judged.exact_match is None else round(judged.exact_match, 4),
                "nll": [round(s.nll, 4) for s in judged.scores],
                "n_tokens": [s.n_tokens for s in judged.scores],
                "tokens": made.n_tokens,
                "cpu_s": round(cpu_s, 1),
                **made.facts,
                **facts,
            }


def read_results(path: Path) -> dict[Key, Row]:
    """The finished lines; one that a killed run left half-written is not counted."""
    return {key_of(row): row for row in read_lines(path) if _WHOLE <= row.keys()}
