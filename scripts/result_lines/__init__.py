"""Results of benchmarks: one line of JSON for each measurement, appended, never changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One line more, on a line of its own whatever a killed run left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def newest(path: Path, fields: Sequence[str]) -> list[Row]:
    """The newest whole row of each combination of the fields, in the file's order.

    Half a line, which a killed run left, is left out.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        key = tuple(row.get(name) for name in fields)
        found.pop(key, None)
        found[key] = row
    return list(found.values())
