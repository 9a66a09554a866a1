"""Recovered loss against passes: coefficients, a LoRA from scratch, and what takes no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from result_lines import Row
from result_lines.svg import save_svg

from gradient_quality.measuring import Key, labels_of

PASSES = (1, 3, 10)
CURVES = {"gradient": "coefficients by gradients", "few": "LoRA from scratch, same examples"}
LINES = {"forward": "best forward-only operator", "mean": "mean at its best scale"}


def draw(rows: dict[Key, Row], path: Path, *, n_labels: int = 16) -> None:
    """A panel for each bed that has every arm of the picture, as an SVG file.

    Args:
        rows: lines of results; only tasks and seeds that every arm has are drawn.
    """
    matplotlib.rcParams |= {"svg.hashsalt": "gradient", "svg.fonttype": "none", "font.size": 10}
    beds = {bed: cases for bed in _beds(rows) if (cases := _cases(rows, bed, n_labels))}
    figure = Figure(figsize=(4.6 * len(beds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(beds), sharey=True, squeeze=False)[0]
    for panel, (bed, cases) in zip(panels, beds.items(), strict=True):
        _draw_bed(panel, rows, bed, cases, n_labels)
    panels[0].set_ylabel("recovered share of the own adapter's gain")
    panels[0].legend(loc="lower right", fontsize=8)
    save_svg(figure, path)


def _draw_bed(
    panel: Axes, rows: dict[Key, Row], bed: str, cases: Sequence[tuple[str, int]], n_labels: int
) -> None:
    for kind, label in CURVES.items():
        shares = [_share(rows, bed, cases, f"{kind}-{n}", n_labels) for n in PASSES]
        panel.plot(PASSES, shares, marker="o", label=label)
    for arm, label in LINES.items():
        style = {"forward": "--", "mean": ":"}[arm]
        share = _share(rows, bed, cases, arm, n_labels)
        panel.axhline(share, color="grey", linestyle=style, label=label)
    panel.set_xscale("log")
    panel.set_xticks(PASSES, [str(n) for n in PASSES])
    panel.minorticks_off()
    panel.set_xlabel(f"passes over {n_labels} examples")
    panel.set_title(f"{bed}, {len({task for task, _ in cases})} tasks", fontsize=10)


def _arms() -> list[str]:
    return [*LINES, *(f"{kind}-{n}" for kind in CURVES for n in PASSES)]


def _beds(rows: dict[Key, Row]) -> list[str]:
    return sorted({row["bed"] for row in rows.values()})


def _cases(rows: dict[Key, Row], bed: str, n_labels: int) -> list[tuple[str, int]]:
    """(task, seed) that have every arm of the picture, and base and own."""
    arms = ["base", "own", *_arms()]
    wanted = {(row["task"], row["seed"]) for row in rows.values() if row["bed"] == bed}
    return sorted(
        case
        for case in wanted
        if all((bed, *case, labels_of(arm, n_labels), arm) in rows for arm in arms)
    )


def _share(
    rows: dict[Key, Row], bed: str, cases: Sequence[tuple[str, int]], arm: str, n_labels: int
) -> float:
    """(base - arm) / (base - own), a ratio of means over the cases."""

    def loss(name: str) -> float:
        keys = [(bed, *case, labels_of(name, n_labels), name) for case in cases]
        return float(np.mean([rows[key]["loss"] for key in keys]))

    return (loss("base") - loss(arm)) / (loss("base") - loss("own"))
