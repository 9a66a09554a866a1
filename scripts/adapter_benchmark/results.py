"""Results of the benchmarks of conversion and merging: appended, read back, told as tables."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from result_lines import Row, append_line, markdown_table, newest

RESULTS = Path(__file__).resolve().parents[2] / "results" / "adapters.jsonl"


def add(path: Path, row: Row) -> None:
    """Print a row and add it to the results, with the machine and the time."""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    told = row | {"machine": machine, "when": when}
    print(json.dumps(told), flush=True)
    append_line(path, told)


def read_rows(path: Path) -> list[Row]:
    """The newest whole row of each part, shape and number of adapters."""
    return newest(path, ("part", "shape", "adapters", "to"))


def report(rows: Sequence[Row]) -> str:
    """One table for each part that has rows."""
    parts = []
    for part, head, line in (("convert", CONVERT, _convert), ("merge", MERGE, _merge)):
        lines = [line(row) for row in rows if row["part"] == part]
        if lines:
            parts.append(markdown_table(head, lines))
    return "\n\n".join(parts) or "Not measured yet."


CONVERT = [
    "shape",
    "adapters",
    "s each",
    "convert_lora_to_gguf.py, s",
    "ratio",
    "same tensors",
    "MB",
]
MERGE = ["shape", "merge", "s", "MB", "PEFT's svd, s", "ratio", "error, ours / PEFT's"]
MERGE += ["the paper's product, s / MB", "the same average by ours, s / MB"]


def _convert(row: Row) -> list[str]:
    compared = "reference_s" in row
    return [
        row["shape"],
        str(row["adapters"]),
        f"{row['seconds_each']:.3f}",
        f"{row['reference_s']:.1f}" if compared else "",
        f"{row['ratio']:.0f}" if compared else "",
        str(row["same_tensors"]) if compared else "",
        f"{row['anonymous_mb']:.0f}" + (f" / {row['reference_mb']:.0f}" if compared else ""),
    ]


def _merge(row: Row) -> list[str]:
    peft, dense, ours = row.get("peft"), row["dense"], row["linear"]
    return [
        row["shape"],
        f"{row['adapters']} of rank {row['rank']} to {row['to']}",
        f"{row['seconds']:.2f}",
        f"{row['anonymous_mb']:.0f}",
        f"{peft['seconds']:.0f} (one layer, scaled)" if peft else "",
        f"{peft['seconds'] / row['seconds']:.0f}" if peft else "",
        f"{peft['our_error']:.6f} / {peft['error']:.6f}" if peft else "",
        f"{dense['seconds']:.2f} / {dense['anonymous_mb']:.0f}",
        f"{ours['seconds']:.2f} / {ours['anonymous_mb']:.0f} "
        f"(1/{dense['seconds'] / ours['seconds']:.1f} and "
        f"1/{dense['anonymous_mb'] / ours['anonymous_mb']:.0f} of those)",
    ]
