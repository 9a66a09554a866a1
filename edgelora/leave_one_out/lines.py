"""Measurements as lines of JSON: appended one by one, read again, half a line left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_lines(path: Path) -> Iterator[Row]:
    """The finished lines of a file; none if there is no file.

    What a killed run left half-written is passed over, as is anything that is no JSON object.
    """
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """One line more, on a line of its own whatever a killed run left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
