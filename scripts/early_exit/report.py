"""The tables of early exit, from the rows of results/early_exit.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from result_lines import markdown_table

from early_exit.quality import TARGETS, WAYS
from early_exit.speed import BENCH_FLOOR, FLOOR, REFERENCE

Row = Mapping[str, Any]
TITLES = {"bures": "nearest by Bures", "mixture": "weight in the mixture"}


def quality_report(rows: Sequence[Row]) -> str:
    """A table for each base, in the order they were measured."""
    return _report(rows, "early-quality", quality_table)


def speed_report(rows: Sequence[Row]) -> str:
    """The same for speed."""
    return _report(rows, "early-speed", speed_table)


def _report(rows: Sequence[Row], part: str, table: Any) -> str:
    return "\n\n".join(table(row) for row in rows if row["part"] == part) or "Not measured yet."


def quality_table(row: Row) -> str:
    """MRR and shares in the first 1 and 5 by layers, for both ways to rank."""
    cells = row["depths"][0][WAYS[0]]["cells"]
    head = [
        "ranked by",
        "layers",
        *(f"{t} ({cells[t]['n']})" for t in TARGETS),
        "mean MRR",
        "top 5",
    ]
    lines = [
        [
            TITLES[way],
            f"{depth['n_layers']} of {row['n_layer']}",
            *(_cell(depth[way]["cells"][target]) for target in TARGETS),
            f"{depth[way]['quality']:.3f}",
            f"{depth[way]['agreement']:.2f}",
        ]
        for way in WAYS
        for depth in row["depths"]
    ]
    made = f", weights in {row['type']}" if row["type"] else ""
    what = (
        f"**{row['model']}**{made}: {row['n_asked']} queries of {row['lines']} lines to a bank of "
        f"{row['n_tasks']} datasets, {row['n_known']} lines each ({row['when']}, commit "
        f"{row['commit']})."
    )
    return f"{what}\n\n{markdown_table(head, lines)}"


def speed_table(row: Row) -> str:
    """Tokens a second and ratios, on one run."""
    head = [
        "system",
        "tokens a second",
        f"of {REFERENCE}'s",
        "of all layers'",
        "layers / these",
        "",
    ]
    lines = [[f"{REFERENCE}, `Llama.embed`", f"{row['theirs']:.0f}", "1.00", "", "", ""]]
    if "bench" in row:
        share = row["bench"] / row["theirs"]
        lines.append(
            ["llama-bench pp, one prompt", f"{row['bench']:.0f}", f"{share:.2f}", "", "", ""]
        )
    for depth in row["depths"]:
        n_layers, n = depth["n_layers"], row["n_layer"]
        whole = n_layers == n
        met = depth["of_theirs"] >= 1.0 if whole else depth["of_layers"] >= FLOOR
        bound = "at least 1.0 of theirs" if whole else f"at least {FLOOR * n / n_layers:.2f} of all"
        lines.append(
            [
                f"edgelora, {n_layers} of {n} layers",
                f"{depth['tokens_per_s']:.0f}",
                f"{depth['of_theirs']:.2f}",
                f"{depth['of_all']:.2f}",
                f"{n / n_layers:.2f}",
                f"{bound}: {'met' if met else '**missed**'}",
            ]
        )
    what = (
        f"**{row['model']}**: {row['n_texts']} texts, {row['n_tokens']} tokens, {row['n_threads']} "
        f"thread(s), fastest of {row['rounds']} rounds in turn ({row['cpu']}, {row['when']}, "
        f"commit {row['commit']}, llama-cpp-python {row['llama_cpp_python']}). All layers to "
        f"theirs, median of the rounds: {row['of_theirs_median']:.2f}; the vectors differ by "
        f"{row['difference']:.1e} of their length.{_beside_bench(row)}"
    )
    return f"{what}\n\n{markdown_table(head, lines)}"


def _beside_bench(row: Row) -> str:
    if "bench" not in row:
        return ""
    verdict = "met" if row["of_bench"] >= BENCH_FLOOR else "**missed**"
    return (
        f" All layers to llama-bench's pp: {row['of_bench']:.2f} (at least {BENCH_FLOOR}: "
        f"{verdict}), median of the rounds {row['of_bench_median']:.2f}."
    )


def _cell(cell: Row) -> str:
    return f"{cell['mrr']:.2f} ({cell['top1']:.2f} / {cell['top5']:.2f})"
