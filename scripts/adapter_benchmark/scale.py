"""Results of the benchmark of large banks: read back, told as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from result_lines import Row, newest

RESULTS = Path(__file__).resolve().parents[2] / "results" / "scale.jsonl"


def read_rows(path: Path) -> list[Row]:
    """The newest row of each part, shape, stage, size of bank and number of merged adapters."""
    return newest(path, ("part", "shape", "stage", "k", "n"))


def report(rows: Sequence[Row]) -> str:
    """The tables of docs/scale.md."""
    parts = []
    for part, title in (("bank", "A real bank"), ("simulated", "Simulated banks")):
        lines = [_line(row) for row in rows if row["part"] == part]
        if lines:
            head = "| adapters | stage | s | CPU s | MB | |\n|---:|---|---:|---:|---:|---|"
            parts.append("\n".join([f"**{title}**", "", head, *lines]))
    return "\n\n".join(parts) or "Not measured yet."


def _line(row: Row) -> str:
    told = []
    if "n" in row:
        told.append(f"{row['n']} adapters, error {row['error']:.4f}, excess {row['excess']:.0e}")
    if "file_bytes" in row:
        told.append(f"{row['file_bytes'] / 1e9:.3g} GB mapped")
    cells = [f"{row['k']:,}", row["stage"], f"{row['seconds']:.3f}", f"{row['cpu_seconds']:.3f}"]
    return f"| {' | '.join([*cells, format(row['anonymous_mb'], '.0f'), ''.join(told)])} |"
