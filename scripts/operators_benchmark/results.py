"""Lines of results and what each is about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradient_quality.arms import parse_arm
from gradient_quality.measuring import Key as GradientKey
from gradient_quality.measuring import key_of as gradient_key_of
from result_lines import Row, read_lines

# split is None for an arm that no bank plays a part in, labels for one that uses none.
KEY = ("bed", "split", "task", "arm", "seed", "labels")
Key = tuple[Any, ...]


def key_of(row: Mapping[str, Any]) -> Key:
    """What a line is about."""
    return tuple(row[name] for name in KEY)


def read_results(path: Path) -> dict[Key, Row]:
    """The finished lines; of two about the same the later one."""
    return {key_of(row): row for row in read_lines(path) if row.keys() >= set(KEY)}


def as_gradient_rows(rows: Mapping[Key, Row]) -> dict[GradientKey, Row]:
    """Lines of the arms that both benchmarks have, as the gradient benchmark writes them."""
    found = [
        row | row.get("items", {}) | {"labels": row["labels"] or 0}
        for row in rows.values()
        if row["split"] in (None, "source") and _is_gradient_arm(row["arm"])
    ]
    return {gradient_key_of(row): row for row in found}


def _is_gradient_arm(name: str) -> bool:
    try:
        parse_arm(name)
    except ValueError:
        return False
    return True
