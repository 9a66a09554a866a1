"""Lines of an evaluation as one row for each arm: losses, answers, what is recovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.leave_one_out.lines import Row
from edgelora.leave_one_out.shares import Recovered, recovered
from edgelora.leave_one_out.splits import families


@dataclass(frozen=True)
class ArmSummary:
    """One arm over all tasks; exact match and ROUGE-L are None where no answers were made.

    Attributes:
        n_tokens: forward-equivalent tokens that finding its adapter took, on average.
    """

    arm: str
    n_tasks: int
    loss: float
    exact_match: float | None
    rouge_l: float | None
    n_tokens: float
    recovered: Recovered


def summarise_arms(rows: Sequence[Row]) -> list[ArmSummary]:
    """An entry for each arm, in the order of the lines.

    Args:
        rows: what run.evaluate_bank returns: each task has every arm.
    """
    by_arm: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["task"]] = row
    family = families({task: row["source"] for task, row in by_arm["base"].items()})
    return [_summary(arm, by_arm, family) for arm in by_arm]


def _summary(arm: str, by_arm: dict[str, dict[str, Row]], family: dict[str, int]) -> ArmSummary:
    tasks = list(by_arm[arm])

    def column(name: str, key: str) -> list[float]:
        return [by_arm[name][task][key] for task in tasks]

    def mean(key: str) -> float | None:
        values = column(arm, key)
        return None if None in values else float(np.mean(values))

    base, losses, own = (column(name, "loss") for name in ("base", arm, "own"))
    return ArmSummary(
        arm=arm,
        n_tasks=len(tasks),
        loss=float(np.mean(losses)),
        exact_match=mean("exact"),
        rouge_l=mean("rouge_l"),
        n_tokens=float(np.mean(column(arm, "tokens"))),
        recovered=recovered(base, losses, own, [family[task] for task in tasks]),
    )
