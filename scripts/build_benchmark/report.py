"""Whole commands at 7B: read back, told as tables, with the bounds that issue them."""

from __future__ import annotations

from pathlib import Path

from result_lines import Row, newest

RESULTS = Path(__file__).resolve().parents[2] / "results" / "build.jsonl"


def read_rows(path: Path = RESULTS) -> list[Row]:
    return newest(path, ("part", "shape", "type"))
