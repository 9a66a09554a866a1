"""The tables of docs/results.md on suggestions, from the rows of results/suggest.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from suggest_benchmark.arms import ARMS
from suggest_benchmark.measuring import OWN, TARGETS, TOPS
from suggest_benchmark.queries import KINDS

Row = Mapping[str, Any]


def report(rows: Sequence[Row]) -> str:
    """How each arm was tuned, then a table for each kind of query, of the half not tuned on."""
    order = {arm.name: place for place, arm in enumerate(ARMS)}
    rows = sorted(rows, key=lambda row: order[row["model"]])
    return "\n\n".join([_tuning(rows), *(_table(rows, kind) for kind in KINDS)])


def _tuning(rows: Sequence[Row]) -> str:
    lines = [
        "| compared by | weights: instruction | prompt | completion | tuning half | other half |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        weights = row["weights"] or {}
        parts = [f"{weights[name]:.3g}" for name in weights] or ["", "", ""]
        numbers = [f"{row['tuning_mrr']:.3f}" if weights else "", f"{row['mrr']:.3f}"]
        lines.append(f"| {' | '.join([row['model'], *parts, *numbers])} |")
    return "\n".join(lines)


def _table(rows: Sequence[Row], kind: str) -> str:
    cells = {
        (row["model"], c["target"]): c for row in rows for c in row["cells"] if c["kind"] == kind
    }
    known = [target for target in TARGETS if any(key[1] == target for key in cells)]
    counts = {
        target: next(c["n"] for key, c in cells.items() if key[1] == target) for target in known
    }
    head = [f"{kind}, compared by", *(f"{target} ({counts[target]})" for target in known)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---|" * len(known)]
    for row in rows:
        found = [_cell(cells.get((row["model"], target)), target) for target in known]
        lines.append(f"| {' | '.join([row['model'], *found])} |")
    return "\n".join(lines)


def _cell(cell: Row | None, target: str) -> str:
    if cell is None:
        return ""
    tops = TOPS[:1] if target == OWN else TOPS
    return " / ".join(f"{cell[f'top{n}']:.2f}" for n in tops)
