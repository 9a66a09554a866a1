"""Results of benchmarks: a line of JSON for each measurement, appended, and told as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgelora.leave_one_out.lines import Row, append_line, read_lines

__all__ = ["Row", "append_line", "markdown_table", "newest", "read_lines"]


def newest(path: Path, fields: Sequence[str]) -> list[Row]:
    """The newest whole row of each combination of the fields, in the file's order."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in read_lines(path):
        key = tuple(row.get(name) for name in fields)
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def markdown_table(
    head: Sequence[str], lines: Iterable[Sequence[str]], n_words: int | None = None
) -> str:
    """A table; after the first `n_words` columns (by default after all) numbers stand right."""
    n_words = len(head) if n_words is None else n_words
    rule = ["---"] * n_words + ["---:"] * (len(head) - n_words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
