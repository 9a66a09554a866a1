"""The table of scoring under several adapters, from the rows of results/score.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from result_lines import Row, markdown_table

RESULTS = Path(__file__).resolve().parents[2] / "results" / "score.jsonl"
FLOOR = 5.0  # times as fast


def report(rows: Sequence[Row]) -> str:
    """Tables for each base, in the order they were measured."""
    return "\n\n".join(map(score_table, rows)) or "Not measured yet."


def score_table(row: Row) -> str:
    """Seconds of both sides, their ratios, and how far the results lie apart."""
    loading = row["ours_open_s"] + row["ours_apply_s"]
    systems = [
        ["edgelora", *_cells(row["ours_s"], row["ours_cpu_s"], loading), ""],
        [
            "llama-cpp-python",
            *_cells(row["theirs_s"], row["theirs_cpu_s"], row["theirs_load_s"]),
            f"{row['theirs_eval_s']:.1f}",
        ],
    ]
    verdict = "met" if row["ratio"] >= FLOOR else "**missed**"
    by_adapter = f"{row['ratio_least']:.1f} to {row['ratio_most']:.1f} by adapter"
    ratios = [
        ["all", f"{row['ratio']:.1f} ({by_adapter})", f"at least {FLOOR:g}: {verdict}"],
        ["all, CPU seconds", f"{row['ratio_cpu']:.1f}", ""],
        ["without loading on either side", f"{row['ratio_loaded']:.1f}", ""],
        ["its forward passes alone / our scoring", f"{row['ratio_eval']:.2f}", ""],
    ]
    rounds = f"medians of {row['rounds']} rounds" if row["rounds"] > 1 else "one round"
    what = (
        f"**{row['model']}**: {row['n_texts']} examples of {row['dataset']} ({row['n_tokens']:,} "
        f"tokens, {row['n_completion_tokens']} of them completions) under {row['n_adapters']} "
        f"adapters, {row['n_threads']} thread(s), {rounds} in turn "
        f"({row['cpu']}, {row['when']}, commit {row['commit']}, llama-cpp-python "
        f"{row['llama_cpp_python']})."
    )
    same = (
        f"Log-likelihoods of both, nats a token: on an F32 copy {row['exact_difference']:.1e} "
        f"apart at most; on this file the mean of an adapter {row['mean_difference']:.3f} at most, "
        f"one example {row['largest_difference']:.2f} at most, {row['median_difference']:.2f} in "
        f"the median, where the adapters lie {row['adapters_apart']:.1f} apart."
    )
    head = ["system", "s", "CPU s", "of these s loading", "forward passes, s"]
    return "\n\n".join(
        [
            what,
            markdown_table(head, systems),
            markdown_table(["theirs / ours", "is", "bound"], ratios),
            same,
        ]
    )


def _cells(total_s: float, cpu_s: float, loading_s: float) -> list[str]:
    share = loading_s / total_s
    return [f"{total_s:.1f}", f"{cpu_s:.1f}", f"{loading_s:.2f} ({share:.1%})"]
