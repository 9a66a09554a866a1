"""The tables of docs/results.md, from the lines of results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from result_lines import Row, markdown_table

from edgelora.leave_one_out.shares import Recovered
from operators_benchmark.pictures import PICTURES, has_material
from operators_benchmark.results import Key
from operators_benchmark.summary import (
    Table,
    best_of,
    count_below,
    nested,
    share_of,
    tables,
)

NOTHING = "Not measured yet."
DEFAULT = "build"
HEADLINE = ("source", 16)
RIVALS = ("mean", "nearest", "random", "shuffled", "lorahub", "few-3", "few-10", "in-context",
          "oracle-single", "ceiling")  # fmt: skip


def sections(rows: Mapping[Key, Row]) -> dict[str, str]:
    """The text of each marked place, by its name."""
    found = tables(rows)
    return {f"operators-{name}": make(found) or NOTHING for name, make in _SECTIONS.items()} | {
        "operators-pictures": _pictures(found) or NOTHING
    }


def is_paper(arm: str, combine: str) -> bool:
    """Whether an arm is one of the twelve cells, combined in this way."""
    exact = arm.endswith("combine=exact")
    return arm.startswith("paper-") and exact == (combine == "exact")


def is_ours(arm: str) -> bool:
    """Whether an arm is an operator of this project."""
    return arm.split("-")[0] in ("op", "gradient", "polish", "forward") or arm.startswith("build")


def forward_only(arm: str) -> bool:
    """Whether it is one of ours that computes no gradient."""
    return is_ours(arm) and not any(word in arm for word in ("gradient", "polish"))


def _headlines(found: Sequence[Table]) -> list[Table]:
    return [table for table in found if (table.split, table.labels) == HEADLINE]


def _arms(found: Sequence[Table]) -> str:
    """Every arm, the best first."""
    return "\n\n".join(map(_arms_of, _headlines(found)))


def _arms_of(table: Table) -> str:
    head = ["arm", "tasks", "recovered loss", "median", "below base", "worst", "exact match",
            "ROUGE-L", "hurt", "tokens", "CPU s"]  # fmt: skip
    there = [arm for arm in table.arms if table.of(arm)]
    ranked = sorted(there, key=lambda arm: -_or_nothing(table.ratio(arm)))
    lines = [_arm_line(table, arm) for arm in ranked]
    chosen = nested(table, [arm for arm in table.arms if is_ours(arm)])
    if chosen is not None:
        _, share = chosen
        lines.append(["*ours, chosen on other sources*", *_share_cells(share), *[""] * 5])
    rows = [row for of in table.arms.values() for by in of.values() for row in by]
    measured = [row for row in rows if row["labels"] == table.labels]
    n_tasks, n_seeds = (len({row[key] for row in measured}) for key in ("task", "seed"))
    title = (f"**{table.bed}**, leave one source out, {table.labels} labels, {n_tasks} "
             f"tasks, {n_seeds} seed(s).")  # fmt: skip
    return f"{title}\n\n{markdown_table(head, lines, 1)}"


def _arm_line(table: Table, arm: str) -> list[str]:
    hurt = count_below(table, arm)
    return [
        arm,
        *_share_cells(table.recovered(arm)),
        *(_with_share(table, arm, key) for key in ("exact", "rouge_l")),
        "" if hurt is None else str(hurt),
        _number(table.mean(arm, "tokens"), "{:,.0f}"),
        _number(table.mean(arm, "cpu_s"), "{:.1f}"),
    ]


def _share_cells(share: Recovered) -> list[str]:
    return [
        str(share.n_tasks),
        _interval((share.low, share.ratio, share.high)),
        _number(share.median),
        _number(share.below, "{:.2f}"),
        _number(share.worst, "{:+.2f}"),
    ]


def _with_share(table: Table, arm: str, key: str) -> str:
    mean = table.mean(arm, key)
    if math.isnan(mean):
        return ""
    share = share_of(table, arm, key)
    return f"{mean:.3f}" if math.isnan(share) else f"{mean:.3f} ({share:.2f})"


def _differences(found: Sequence[Table]) -> str:
    """The default beside its rivals, paired by task."""
    parts = []
    for table in _headlines(found):
        pairs = [(DEFAULT, rival) for rival in _rivals(table)]
        best = best_of(table, filter(forward_only, table.arms))
        if best not in (None, DEFAULT):
            pairs += [(best, rival) for rival in [DEFAULT, *_rivals(table)]]
        lines = [_pair_line(table, *p) for p in pairs if all(table.of(arm) for arm in p)]
        if lines:
            head = ["arm", "beside", "recovered loss", "exact match", "ROUGE-L"]
            parts.append(f"**{table.bed}**\n\n{markdown_table(head, lines, 2)}")
    return "\n\n".join(parts)


def _rivals(table: Table) -> list[str]:
    """The best paper cells in hindsight, which is kind to them, then the others."""
    cells = [
        best_of(table, [arm for arm in table.arms if is_paper(arm, combine)])
        for combine in ("linear", "exact")
    ]
    return [*(cell for cell in cells if cell), *(arm for arm in RIVALS if table.of(arm))]


def _pair_line(table: Table, first: str, second: str) -> list[str]:
    scores = [table.difference(first, second, key) for key in ("exact", "rouge_l")]
    return [first, second, _interval(table.ahead(first, second), "{:+.3f}"),
            *("" if s is None else _interval(s, "{:+.3f}") for s in scores)]  # fmt: skip


def _categories(found: Sequence[Table]) -> str:
    """Recovered loss by category of the tasks, of a few arms."""
    parts = []
    for table in _headlines(found):
        arms = _few_arms(table)
        by_category: dict[str, list[str]] = {}
        for task in table.tasks:
            for name in table.arms["base"][task][0]["category"] or ["(none)"]:
                by_category.setdefault(name, []).append(task)
        lines = [
            [name, str(len(tasks)), *(_in_category(table, arm, tasks) for arm in arms)]
            for name, tasks in sorted(by_category.items())
        ]
        if lines and arms:
            head = markdown_table(["category", "tasks", *arms], lines, 1)
            parts.append(f"**{table.bed}**\n\n{head}")
    return "\n\n".join(parts)


def _in_category(table: Table, arm: str, tasks: Sequence[str]) -> str:
    there = [task for task in tasks if task in table.arms[arm]]
    return _number(table.ratio(arm, there), "{:.2f}") if there else ""


def _few_arms(table: Table) -> list[str]:
    """The arms that smaller tables show."""
    cells = _rivals(table)[:2] if any(a.startswith("paper-") for a in table.arms) else []
    best = best_of(table, filter(forward_only, table.arms))
    wanted = [*cells, "mean", best or "", DEFAULT, "few-10", "ceiling"]
    return [arm for arm in dict.fromkeys(wanted) if table.of(arm)]


def _splits(found: Sequence[Table]) -> str:
    """How much depends on what is hidden."""
    return _crossed(found, "hidden", lambda t: t.split if t.labels == HEADLINE[1] else None)


def _labels(found: Sequence[Table]) -> str:
    """How much depends on the number of labels, then every arm at each but the headline's."""
    crossed = _crossed(found, "labels", lambda t: str(t.labels) if t.split == HEADLINE[0] else None)
    others = [t for t in found if t.split == HEADLINE[0] and t.labels != HEADLINE[1]]
    return "\n\n".join([crossed, *map(_arms_of, others)])


def _crossed(found: Sequence[Table], what: str, column_of: Callable[[Table], str | None]) -> str:
    """Arms by columns of several tables, by bed, without those of the headline's column alone.

    Ways to combine the same adapters have a table of their own, `_merges`.
    """
    parts = []
    for bed in dict.fromkeys(table.bed for table in found):
        there = [(c, t) for t in found if t.bed == bed and (c := column_of(t)) is not None]
        if len(there) < 2:
            continue
        others = [t for _, t in there if (t.split, t.labels) != HEADLINE]
        arms = dict.fromkeys(arm for _, table in there for arm in table.arms if table.of(arm))
        wanted = [a for a in arms if a not in ("base", "own") and not a.startswith("uniform ")
                  and any(t.of(a) for t in others)]  # fmt: skip
        lines = [[arm, *(_crossing(table, arm) for _, table in there)] for arm in wanted]
        head = ["arm", *(f"{what} {column}" for column, _ in there)]
        parts.append(f"**{bed}**\n\n{markdown_table(head, lines, 1)}")
    return "\n\n".join(parts)


def _crossing(table: Table, arm: str) -> str:
    if not table.of(arm):
        return ""
    share = table.recovered(arm)
    told = _interval((share.low, share.ratio, share.high), "{:.2f}")
    return f"{told}, median {_number(share.median, '{:.2f}')} ({share.n_tasks})"


def _merges(found: Sequence[Table]) -> str:
    """The uniform mean averaged, summed and cut, and how alike the adapters' factors are."""
    head = ["bed", "arm", "tasks", "recovered loss", "rank", "merge error", "cosine of A", "of B"]
    lines = []
    for table in _headlines(found):
        merges = [arm for arm in table.arms if arm.startswith("uniform ")]
        for arm in ["uniform", *merges] if merges else []:
            if table.of(arm):
                share = table.recovered(arm)
                keys = ("rank", "merge_error", "cosine_a", "cosine_b")
                numbers = [_number(table.mean(arm, key), "{:.3g}") for key in keys]
                told = _interval((share.low, share.ratio, share.high))
                lines.append([table.bed, arm, str(share.n_tasks), told, *numbers])
    return markdown_table(head, lines, 2) if lines else ""


def _paper(found: Sequence[Table]) -> str:
    """The paper's own measures, of the arms that have them."""
    keys = ("subsequence", "rouge_l", "rouge_lsum", "mse_factors", "mse_updates")
    parts = []
    for table in _headlines(found):
        lines = []
        for arm in table.arms:
            rows = [r["paper"] for t in table.of(arm) for r in table.arms[arm][t] if "paper" in r]
            if rows:
                lines.append([arm, *(_paper_mean(rows, key) for key in keys)])
        if lines:
            head = ["arm", "subsequence", "ROUGE-L", "ROUGE-Lsum", "MSE of factors",
                    "MSE of updates"]  # fmt: skip
            parts.append(f"**{table.bed}**\n\n{markdown_table(head, lines, 1)}")
    return "\n\n".join(parts)


def _paper_mean(rows: Iterable[Row], key: str) -> str:
    values = [row.get(key) for row in rows]
    if None in values:
        return ""
    return _number(float(np.mean(np.array(values, float))),
                   "{:.2e}" if key.startswith("mse") else "{:.3f}")  # fmt: skip


def _pictures(found: Sequence[Table]) -> str:
    there = [(name, words) for name, words in PICTURES.items() if has_material(name, found)]
    return "\n\n".join(f"![{words}]({name})" for name, words in there)


_SECTIONS: dict[str, Callable[[Sequence[Table]], str]] = {
    "arms": _arms,
    "differences": _differences,
    "categories": _categories,
    "splits": _splits,
    "labels": _labels,
    "merges": _merges,
    "paper": _paper,
}


def _interval(values: tuple[float, float, float], form: str = "{:.3f}") -> str:
    low, mid, high = (_number(value, form) for value in values)
    return f"{mid} [{low}, {high}]" if low and high else mid


def _number(value: float, form: str = "{:.3f}") -> str:
    return form.format(value) if math.isfinite(value) else ""


def _or_nothing(value: float) -> float:
    return -math.inf if math.isnan(value) else value
