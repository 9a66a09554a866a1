"""Results of benchmarks: one line of JSON for each measurement, appended, never changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgelora.leave_one_out.lines import Row, append_line, read_lines

__all__ = ["Row", "append_line", "newest", "read_lines"]


def newest(path: Path, fields: Sequence[str]) -> list[Row]:
    """The newest whole row of each combination of the fields, in the file's order."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in read_lines(path):
        key = tuple(row.get(name) for name in fields)
        found.pop(key, None)
        found[key] = row
    return list(found.values())
