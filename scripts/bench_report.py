"""Write the tables of docs/ from the measurements that are committed in results/.

usage: python scripts/bench_report.py [--check]

Each table stands between <!-- NAME --> and <!-- /NAME --> in its page; the words around it are
written by hand. Of several measurements of one part and model the newest counts. --check writes
nothing and fails where a page is not what the results say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import adapter_benchmark.results as adapters
import adapter_benchmark.scale as scale
import adapter_benchmark.scoring_report as scoring
import build_benchmark.report as builds
import early_exit.report as early
import gradient_quality.report as gradients
import operators_benchmark.report as operators
import suggest_benchmark.report as suggestions
from gradient_quality.measuring import read_results as read_gradients
from operators_benchmark.results import as_gradient_rows
from operators_benchmark.results import read_results as read_operators
from result_lines import markdown_table, newest, read_lines

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "serve.jsonl"
PAGE = ROOT / "docs" / "performance.md"
SUGGESTIONS = ROOT / "results" / "suggest.jsonl"
RESULTS_PAGE = ROOT / "docs" / "results.md"
GRADIENTS = ROOT / "results" / "gradient_quality.jsonl"
GRADIENTS_PAGE = ROOT / "docs" / "gradient.md"
SCALE_PAGE = ROOT / "docs" / "scale.md"
OPERATORS = ROOT / "results" / "operators.jsonl"
EARLY = ROOT / "results" / "early_exit.jsonl"
TYPES = ROOT / "results" / "types.jsonl"
NOTHING = "Not measured yet."
Measured = dict[str, Any]


def read_results(path: Path) -> list[Measured]:
    """The newest whole row of each part and model, in the file's order."""
    return newest(path, ("part", "model"))


def fill(page: str, rows: Sequence[Measured]) -> str:
    """The page with every table as the rows have it.

    Raises:
        SystemExit: a table whose place the page does not have.
    """
    for part, section in SECTIONS.items():
        of_part = [row for row in rows if row["part"] == part]
        page = put(page, part, "\n\n".join(map(section, of_part)) or NOTHING)
    return page


def put(page: str, part: str, text: str) -> str:
    """The page with `text` at the place of one part.

    Raises:
        SystemExit: the page has no such place, or two.
    """
    place = re.compile(rf"(<!-- {part} -->\n).*?(\n<!-- /{part} -->)", re.DOTALL)
    page, n = place.subn(lambda found: f"{found[1]}{text}{found[2]}", page)
    if n != 1:
        raise SystemExit(f"the page has {n} places <!-- {part} -->, one is needed")
    return page


def put_all(page: str, told: Mapping[str, str]) -> str:
    """The page with every text at its place.

    Raises:
        SystemExit: see put.
    """
    for name, text in told.items():
        page = put(page, name, text)
    return page


def pages() -> dict[Path, str]:
    """Every page with tables, as the results say that it should be."""
    told = {"suggest": suggestions.report(read_results(SUGGESTIONS))}
    side_by_side = read_operators(OPERATORS)
    told |= operators.sections(side_by_side)
    exits = read_results(EARLY)
    told["early-quality"] = early.quality_report(exits)
    measured = {
        "adapters": adapters.report(adapters.read_rows(adapters.RESULTS)),
        "early-speed": early.speed_report(exits),
        "score": scoring.report(read_results(scoring.RESULTS)),
        "types": types_report(TYPES),
        "builds": builds.report(builds.read_rows()),
    }
    return {
        PAGE: put_all(fill(PAGE.read_text(encoding="utf-8"), read_results(RESULTS)), measured),
        GRADIENTS_PAGE: put(
            GRADIENTS_PAGE.read_text(encoding="utf-8"),
            "gradient",
            gradients.report(as_gradient_rows(side_by_side) | read_gradients(GRADIENTS)),
        ),
        SCALE_PAGE: put(
            SCALE_PAGE.read_text(encoding="utf-8"),
            "scale",
            scale.report(scale.read_rows(scale.RESULTS)),
        ),
        RESULTS_PAGE: put_all(RESULTS_PAGE.read_text(encoding="utf-8"), told),
    }


def types_report(path: Path) -> str:
    """A table for each line that `edgelora doctor --measure BASE --json` printed."""
    return "\n\n".join(map(_types, read_lines(path))) or NOTHING


def _types(row: Measured) -> str:
    part = f", from {row['n_measured']} of its {row['n_layer']} layers"
    what = (
        f"**{row['base']}**{part if row['n_measured'] < row['n_layer'] else ''}, {row['cpu']}, "
        f"{row['cores']} cores, {row['threads']['prompt']} threads for prompts and "
        f"{row['threads']['decode']} for answers, llama-cpp-python {row['llama_cpp_python']}. "
        f"Fastest: {row['fastest']}."
    )
    lines = [
        [t["file_type"], f"{t['size_bytes'] / 1e9:.2f}", f"{t['prompt']:.1f}", f"{t['decode']:.1f}"]
        for t in row["types"]
    ]
    return f"{what}\n\n{markdown_table(['type', 'GB', 'prompt, tokens a second', 'answer'], lines)}"


def _parallel(row: Measured) -> str:
    head = ["system", "adapter", "whole", "streamed", "8th first token", "Python, µs a token"]
    lines = [
        [
            system["system"],
            _adapter(system),
            _speed(system.get("whole")),
            _speed(system.get("streamed")),
            _seconds(system.get("eighth_first_s")),
            _python(system),
        ]
        for system in row["systems"]
    ]
    shape = (
        f"{row['n_clients']} clients, prompts of {row['n_prompt']}, answers of {row['n_tokens']}"
    )
    return _section(row, f"{shape} tokens; tokens a second, prompts and answers", head, lines)


def _single(row: Measured) -> str:
    lines = [
        [
            system["system"],
            _adapter(system),
            _speed(system["decode"]),
            _speed(system.get("streamed")),
        ]
        for system in row["systems"]
    ]
    shape = f"{row['n_tokens']} tokens after {row['n_prompt']}; tokens a second while decoding"
    costs = ", ".join(f"{name}: {value:.2f} ms" for name, value in row["cost_ms"].items())
    used = row["python_us"]
    spent = (
        f"A token of ours: {used['decode']:.0f} µs in llama_decode, {used['sample']:.0f} µs in "
        f"llama.cpp's samplers, {used['python']:.0f} µs of Python. Added to each token: {costs}."
    )
    return _section(row, shape, ["system", "adapter", "whole", "streamed"], lines, spent)


def _prefix(row: Measured) -> str:
    lines = [
        [
            system["system"],
            _seconds(system["first_s"]),
            _seconds(system["second_s"]),
            f"{system['ratio']:.3f}",
        ]
        for system in row["systems"]
    ]
    shape = f"{row['n_prefix']} tokens in common, {row['n_own']} of its own; first token"
    return _section(row, shape, ["system", "first", "second", "second / first"], lines)


def _coldstart(row: Measured) -> str:
    lines = [[system["system"], _seconds(system["seconds"])] for system in row["systems"]]
    size = f", {row['file_bytes'] / 1e9:.1f} GB" if "file_bytes" in row else ""
    return _section(row, f"from the command to: {row['until']}{size}", ["system", "time"], lines)


def _isolation(row: Measured) -> str:
    head = ["requests", "equal", "other text", "of these ties", "largest difference", "median"]
    head += ["sets lie apart"]
    numbers = [str(row[key]) for key in ("n_requests", "equal", "other_text", "ties")]
    numbers += [f"{row[key]:.2g}" for key in ("worst", "median", "sets_apart")]
    return _section(row, f"KV {row['kv_type']}; differences in nats", head, [numbers])


SECTIONS: dict[str, Callable[[Measured], str]] = {
    "isolation": _isolation,
    "parallel": _parallel,
    "single": _single,
    "prefix": _prefix,
    "coldstart": _coldstart,
}


def _section(
    row: Measured, title: str, head: Sequence[str], lines: Iterable[Sequence[str]], after: str = ""
) -> str:
    """A title, what was measured on what, the numbers, and the bounds."""
    machine = (
        f"{row['cpu']}, {row['n_threads']} threads, {row['when']}, commit {row['commit']}, "
        f"llama-cpp-python {row['llama_cpp_python']}, medians of {row['rounds']} rounds"
    )
    parts = [f"**{row['model']}**, {title}.", machine + ".", markdown_table(head, lines)]
    parts += [after] if after else []
    return "\n\n".join(
        [*parts, markdown_table(["of ours", "is", "bound", ""], map(_bound, row["targets"]))]
    )


def _bound(bound: Measured) -> Sequence[str]:
    words = [f"at least {bound['least']:g}"] if bound["least"] is not None else []
    words += [f"at most {bound['most']:g}"] if bound["most"] is not None else []
    verdict = ("met" if bound["met"] else "**missed**") if words else ""
    return [bound["name"], f"{bound['value']:.3g}", ", ".join(words), verdict]


def _adapter(system: Measured) -> str:
    return system["adapter"] or "none"


def _speed(spread: Measured | None) -> str:
    return f"{spread['median']:.1f} ({spread['min']:.1f} to {spread['max']:.1f})" if spread else ""


def _seconds(spread: Measured | None) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.2f} s ({spread['min']:.2f} to {spread['max']:.2f})"


def _python(system: Measured) -> str:
    names = (f"{mode}_python_us" for mode in ("whole", "streamed"))
    return " / ".join(f"{system[name]['median']:.0f}" for name in names if name in system)


def main() -> int:
    """Fill the pages in; with --check only compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    options = parser.parse_args()
    filled = pages()
    if options.check:
        return int(any(page.read_text(encoding="utf-8") != text for page, text in filled.items()))
    for page, text in filled.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
