"""Whole commands at the size of Mistral-7B: read back, told as tables with their bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from result_lines import Row, markdown_table, newest

RESULTS = Path(__file__).resolve().parents[2] / "results" / "build.jsonl"
# part: what the command is, seconds and MB at most (None: no bound).
COMMANDS: dict[str, tuple[str, float | None, float | None]] = {
    "first": ("build, first time", 600, None),
    "again": ("build, repeated", 60, None),
    "forward": ("build --low-ram --refine forward", None, 450),
    "gradient": ("build --low-ram --refine gradient", None, 900),
    "convert": ("bank add, one adapter, converting only", None, 120),
    "embed": ("bank add --data", 180, None),
    "embed-low-ram": ("bank add --data --low-ram", 180, 450),
    "ls": ("bank ls", None, None),
    "suggest": ("suggest", 1, None),
    "serve": ("serve --low-ram, one slot of 4,096, q8_0 KV, to its first answer", None, 700),
}
ESTIMATE = 0.25


def read_rows(path: Path = RESULTS) -> list[Row]:
    """The newest row of each part, shape, type and limit of memory."""
    return newest(path, ("part", "shape", "type", "limit_gb"))


def report(rows: Sequence[Row]) -> str:
    """Every command beside its bounds, then where the time of each build went."""
    if not rows:
        return "Not measured yet."
    order = list(COMMANDS)
    rows = sorted(
        rows,
        key=lambda row: (row["shape"], row["type"], order.index(row["part"]), _limit(row) or 0),
    )
    head = ["command", "s", "at most", "MB", "at most", "GB from disk"]
    table = markdown_table(head, map(_command, rows))
    return "\n\n".join([table, *(_stages(row) for row in rows if "stages_s" in row)])


def _command(row: Row) -> list[str]:
    _, seconds, size_mb = COMMANDS[row["part"]]
    read = f"{row['disk_gb']:.1f}" if "disk_gb" in row else ""
    return [_name(row), f"{row['seconds']:.1f}", _bound(row["seconds"], seconds),
            f"{row['peak_mb']:.0f}", _bound(row["peak_mb"], size_mb), read]  # fmt: skip


def _name(row: Row) -> str:
    limit = _limit(row)
    return COMMANDS[row["part"]][0] + (f", in a cgroup of {limit:g} GB" if limit else "")


def _threads(row: Row) -> str:
    n_threads = row.get("n_threads", 0)
    return f"{n_threads} thread(s)" if n_threads else f"{row['n_cores']} cores"


def _limit(row: Row) -> float | None:
    limit: float | None = row.get("limit_gb")
    return limit


def _bound(value: float, bound: float | None) -> str:
    if bound is None:
        return ""
    return f"{bound:g}: {'met' if value <= bound else '**missed**'}"


def _stages(row: Row) -> str:
    """Seconds by stage, the longest first; the estimate beside what came; the rates that bound."""
    told = sorted(row["stages_s"].items(), key=lambda item: -item[1])
    stages = "; ".join(f"{name} {seconds:.1f}" for name, seconds in told if seconds >= 0.05)
    text = (
        f"**{_name(row)}** ({row['shape']} {row['type']}, {row['data']}, {row['n_tokens']:,} "
        f"tokens, {row['cpu']}, {_threads(row)}, commit {row['commit']}), seconds: {stages}."
    )
    planned = row["planned"]
    if planned and planned["seconds"] and row["part"] == "first":
        came = row["elapsed_s"] - planned["told_after_s"]
        ratio = came / planned["seconds"]
        verdict = "met" if abs(ratio - 1) <= ESTIMATE else "**missed**"
        text += (
            f" The plan, told after {planned['told_after_s']:.0f} s, said {planned['seconds']:.0f} "
            f"more; it took {came:.0f} ({ratio:.2f} of it; within {ESTIMATE:.0%}: {verdict})."
        )
    if "prompt_tokens_per_s" in row:
        text += (
            f" This machine: llama.cpp reads {row['prompt_tokens_per_s']:.1f} prompt tokens a "
            f"second of this base without an adapter, a core copies {row['copy_gb_per_s']:.1f} GB "
            "a second."
        )
    return text
