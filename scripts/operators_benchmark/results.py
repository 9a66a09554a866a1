"""Lines of results and what each is about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
