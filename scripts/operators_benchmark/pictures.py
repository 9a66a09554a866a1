"""The pictures of docs/results.md: shares with intervals, shares against tokens, coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from result_lines import Row
from result_lines.svg import save_svg

from operators_benchmark.results import Key
from operators_benchmark.summary import Table, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = "operators-recovered.svg"
TOKENS = "operators-tokens.svg"
COEFFICIENTS = "operators-coefficients.svg"
PICTURES = {
    SHARES: "Recovered share of loss by arm, with 95 % intervals",
    TOKENS: "Recovered share of loss against forward-equivalent tokens",
    COEFFICIENTS: "Coefficients by task and adapter",
}
SHOWN = ("paper-js-normalized combine=exact", "build")
COLOURS = {"paper": "tab:orange", "ours": "tab:blue", "other": "tab:gray"}


def has_material(name: str, found: Sequence[Table]) -> bool:
    """Whether there is something to draw."""
    return bool(_panels(name, found))


def draw_all(rows: Mapping[Key, Row], folder: Path) -> list[Path]:
    """Every picture that there is material for, as SVG files; the same rows give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "operators", "svg.fonttype": "none", "font.size": 8}
    found, drawn = tables(rows), []
    for name, draw in _DRAW.items():
        panels = _panels(name, found)
        if not panels:
            continue
        figure = Figure(figsize=(4.6 * len(panels), _HEIGHTS[name]), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (table, arm) in zip(axes, panels, strict=True):
            draw(panel, table, arm)
        save_svg(figure, folder / name)
        drawn.append(folder / name)
    return drawn


def _panels(name: str, found: Sequence[Table]) -> list[tuple[Table, str]]:
    """What each panel shows: a table, and an arm of it where the picture is of one."""
    headlines = [t for t in found if (t.split, t.labels) == ("source", 16) and t.tasks]
    if name != COEFFICIENTS:
        return [(table, "") for table in headlines if _arms(table)]
    return [(t, arm) for t in headlines for arm in SHOWN if any(_coefficients(t, arm).values())]


def _arms(table: Table) -> list[str]:
    """Arms with a share, the best last."""
    there = [a for a in table.arms if a not in ("base", "own") and table.of(a)]
    shares = {arm: table.ratio(arm) for arm in there}
    return sorted((a for a in there if math.isfinite(shares[a])), key=lambda a: shares[a])


def _draw_shares(panel: Axes, table: Table, _: str) -> None:
    arms = _arms(table)
    for place, arm in enumerate(arms):
        share = table.recovered(arm)
        sides = [[share.ratio - share.low], [share.high - share.ratio]]
        bars = sides if np.isfinite(sides).all() else None
        panel.errorbar(share.ratio, place, xerr=bars, fmt="o", ms=3, color=_colour(arm))
    panel.set_yticks(range(len(arms)), arms)
    panel.axvline(0, color="black", lw=0.5)
    panel.axvline(1, color="black", lw=0.5)
    panel.set_xlabel("recovered share of the own adapter's gain in loss")
    panel.set_title(_title(table))


def _draw_tokens(panel: Axes, table: Table, _: str) -> None:
    """Points with their names; of the paper's cells, which lie on each other, only the best has."""
    arms = _arms(table)
    cells = [arm for arm in arms if arm.startswith("paper-")]
    for arm in arms:
        tokens = max(1.0, table.mean(arm, "tokens"))
        share = table.ratio(arm)
        panel.plot(tokens, share, "o", ms=3, color=_colour(arm))
        if arm in cells[:-1]:
            continue
        panel.annotate(arm, (tokens, share), fontsize=5, xytext=(2, 2), textcoords="offset points")
    panel.set_xscale("log")
    panel.set_xlabel("forward-equivalent tokens to find the adapter")
    panel.set_ylabel("recovered share")
    panel.set_title(_title(table))


def _draw_coefficients(panel: Axes, table: Table, arm: str) -> None:
    """A square for each of the largest coefficients: area by size, colour by sign."""
    by_task = _coefficients(table, arm)
    place = {task: i for i, task in enumerate(sorted(table.tasks, key=_category_of(table)))}
    squares = [
        (place[name], place[task], value)
        for task, named in by_task.items()
        for name, value in named.items()
        if name in place
    ]
    x, y, values = (np.array(column, float) for column in zip(*squares, strict=True))
    colours = np.where(values > 0, "tab:blue", "tab:red")
    panel.scatter(x, y, s=24 * np.abs(values) / np.abs(values).max(), c=colours, marker="s", lw=0)
    panel.set_aspect("equal")
    panel.set_xlim(-1, len(place))
    panel.set_ylim(len(place), -1)
    panel.set_xlabel("adapter, by category")
    panel.set_ylabel("task, by category")
    panel.set_title(f"{table.bed}: {arm}")


def _coefficients(table: Table, arm: str) -> dict[str, dict[str, float]]:
    """Of each task, those that the line of its first seed names."""
    return {
        task: min(table.arms[arm][task], key=lambda row: row["seed"]).get("coefficients", {})
        for task in table.of(arm)
    }


def _category_of(table: Table) -> Any:
    return lambda task: (table.arms["base"][task][0]["category"], task)


def _colour(arm: str) -> str:
    if arm.startswith("paper-"):
        return COLOURS["paper"]
    ours = arm.split("-")[0].split(" ")[0] in ("op", "forward", "gradient", "polish", "build")
    return COLOURS["ours" if ours else "other"]


def _title(table: Table) -> str:
    return f"{table.bed}, {len(table.tasks)} tasks, {table.labels} labels"


_DRAW = {SHARES: _draw_shares, TOKENS: _draw_tokens, COEFFICIENTS: _draw_coefficients}
_HEIGHTS = {SHARES: 7.0, TOKENS: 4.2, COEFFICIENTS: 4.8}
