"""The tables of results: shares of loss recovered, exact match, paired differences, intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from result_lines import Row

from edgelora.leave_one_out.shares import MIN_GAP
from edgelora.metrics import paired_bootstrap
from gradient_quality.measuring import WITHOUT_LABELS, Key, labels_of


def report(rows: dict[Key, Row]) -> str:
    """A table for each bed and number of labels, of the tasks that every arm in it has."""
    kinds = sorted({(row["bed"], row["labels"]) for row in rows.values() if row["labels"]})
    tables = [t for bed, labels in kinds if (t := _table(rows, bed, labels))]
    return "\n\n".join(tables)


def _table(rows: dict[Key, Row], bed: str, labels: int) -> str:
    """Arms that some tasks lack are told apart: each is compared on the tasks that it has."""
    arms = _arms(rows, bed, labels)
    cases = _cases(rows, bed, labels)
    if not cases:
        return ""
    lines = [
        f"### {bed}, {labels} labels: {len({task for task, _ in cases})} tasks, "
        f"{len({seed for _, seed in cases})} seed(s)",
        "",
        "| arm | cases | recovered loss | above `forward` | above `few` | exact match | rank |"
        " forward-equivalent tokens | below base |",
        "|---|" + "---:|" * 8,
    ]
    lines += [_line(rows, bed, labels, cases, arm) for arm in arms]
    stops = _stops(rows, bed, labels, cases)
    return "\n".join([*lines, "", *stops] if stops else lines)


def _arms(rows: dict[Key, Row], bed: str, labels: int) -> list[str]:
    """In the order in which they were first measured, base and own first."""
    found = [row["arm"] for row in rows.values() if (row["bed"], row["labels"]) == (bed, labels)]
    return list(dict.fromkeys([*WITHOUT_LABELS, *found]))


def _cases(rows: dict[Key, Row], bed: str, labels: int) -> list[tuple[str, int]]:
    """(task, seed) with base, own and something to compare."""
    wanted = {
        (row["task"], row["seed"])
        for row in rows.values()
        if (row["bed"], row["labels"]) == (bed, labels)
    }
    return sorted(
        (task, seed)
        for task, seed in wanted
        if all((bed, task, seed, 0, arm) in rows for arm in WITHOUT_LABELS)
    )


def _of(
    rows: dict[Key, Row], bed: str, labels: int, cases: Iterable[tuple[str, int]], arm: str
) -> dict[tuple[str, int], Row]:
    keys = {case: (bed, *case, labels_of(arm, labels), arm) for case in cases}
    return {case: rows[key] for case, key in keys.items() if key in rows}


def _line(
    rows: dict[Key, Row], bed: str, labels: int, cases: Sequence[tuple[str, int]], arm: str
) -> str:
    own = _of(rows, bed, labels, cases, "own")
    base = _of(rows, bed, labels, cases, "base")
    mine = _of(rows, bed, labels, cases, arm)
    few = arm.partition(" ")[0].replace("gradient", "few")
    few = few if few in ("few-1", "few-3") else "few-10"
    cells = [
        arm,
        str(len(mine)),
        _interval(mine, base, own),
        _difference(mine, _of(rows, bed, labels, cases, "forward"), base, own),
        _difference(mine, _of(rows, bed, labels, cases, few), base, own),
        _exact(mine, own),
        _mean(mine, "rank"),
        _mean(mine, "tokens"),
        str(sum(_is_worse(row, base[case]) for case, row in mine.items())),
    ]
    return "| " + " | ".join(cells) + " |"


def _interval(mine: dict[Any, Row], base: dict[Any, Row], own: dict[Any, Row]) -> str:
    """(base - arm) / (base - own), a ratio of means, with a 95 % interval by source."""
    gains = {case: base[case]["loss"] - row["loss"] for case, row in mine.items()}
    return _ratio(mine, gains, base, own)


def _difference(
    mine: dict[Any, Row], other: dict[Any, Row], base: dict[Any, Row], own: dict[Any, Row]
) -> str:
    """The same of (other - arm), on the cases that both have; then the gain in exact match."""
    both = {case: row for case, row in mine.items() if case in other}
    if not both or mine.keys() == other.keys() and all(mine[c] is other[c] for c in mine):
        return ""
    told = _ratio(both, {c: other[c]["loss"] - r["loss"] for c, r in both.items()}, base, own)
    exact = {
        case: row["exact"] - other[case]["exact"]
        for case, row in both.items()
        if row["exact"] is not None and other[case]["exact"] is not None
    }
    if not exact:
        return told
    ones = np.ones(len(exact))
    low, mid, high = paired_bootstrap(list(exact.values()), ones, _clusters(both, exact))
    return f"{told}, exact {mid:+.2f} [{low:+.2f}, {high:+.2f}]"


def _ratio(
    mine: dict[Any, Row], gains: dict[Any, float], base: dict[Any, Row], own: dict[Any, Row]
) -> str:
    """Gains over what the own adapters gain, where that is more than MIN_GAP."""
    gaps = {case: base[case]["loss"] - own[case]["loss"] for case in mine}
    wide = [case for case, gap in gaps.items() if gap > MIN_GAP]
    if not wide:
        return ""
    weights = np.array([gaps[case] for case in wide])
    low, mid, high = paired_bootstrap([gains[c] for c in wide], weights, _clusters(mine, wide))
    return f"{mid:.3f} [{low:.3f}, {high:.3f}]"


def _clusters(rows: dict[Any, Row], cases: Iterable[Any]) -> list[str]:
    return ["+".join(rows[case]["source"]) for case in cases]


def _exact(mine: dict[Any, Row], own: dict[Any, Row]) -> str:
    """The mean, and its share of the own adapters' mean on the same cases."""
    values = {case: row["exact"] for case, row in mine.items() if row["exact"] is not None}
    reached = [own[case]["exact"] for case in values]
    if not values or None in reached:
        return ""
    mean, of_own = np.mean(list(values.values())), np.mean(reached)
    return f"{mean:.3f} ({mean / of_own:.2f} of own)" if of_own else f"{mean:.3f}"


def _mean(mine: dict[Any, Row], key: str) -> str:
    values = [row[key] for row in mine.values() if row.get(key)]
    return f"{np.mean(values):,.0f}" if values else ""


def _is_worse(row: Row, base: Row) -> bool:
    """Whether its loss is above the base's beyond the paired interval of its items."""
    if "loss_vs_base" in row:
        return bool(row["loss_vs_base"][0] > 0)
    gaps = np.array(row["nll"]) - np.array(base["nll"])
    return paired_bootstrap(gaps, np.array(base["n_tokens"], float))[0] > 0


def _stops(
    rows: dict[Key, Row], bed: str, labels: int, cases: Sequence[tuple[str, int]]
) -> list[str]:
    """Where cross-validated descents stopped, and what the best of the passes measured is."""
    return [line for arm in _arms(rows, bed, labels) if arm.partition(" ")[0] == "gradient-cv"
            for line in _stop(rows, bed, labels, cases, arm)]  # fmt: skip


def _stop(
    rows: dict[Key, Row], bed: str, labels: int, cases: Sequence[tuple[str, int]], arm: str
) -> list[str]:
    stopped = _of(rows, bed, labels, cases, arm)
    passes = [row["passes"] for row in stopped.values()]
    lines = [f"- *{arm}* stopped after {np.mean(passes):.1f} passes on average "
             f"({min(passes)} to {max(passes)})."]  # fmt: skip
    without = {n: _of(rows, bed, labels, stopped, f"gradient-{n}") for n in range(1, 21)}
    measured = [n for n, of in without.items() if of]
    both = {c: row for c, row in stopped.items() if all(c in without[n] for n in measured)}
    if len(measured) > 1 and both:
        best = {c: min(without[n][c]["loss"] for n in measured) for c in both}
        above = [row["loss"] - best[c] for c, row in both.items()]
        base, own = (_of(rows, bed, labels, both, arm) for arm in WITHOUT_LABELS)
        gaps = [base[c]["loss"] - own[c]["loss"] for c in both]
        lines.append(
            f"  Its loss on the test lines is above the least of those after "
            f"{', '.join(map(str, measured))} passes by {sum(above) / sum(gaps):.3f} of the gap "
            f"(at most {max(above):.2f} nats, below it in {sum(a < 0 for a in above)} of "
            f"{len(above)} cases)."
        )
    return lines
