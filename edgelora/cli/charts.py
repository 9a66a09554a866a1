"""Charts for a terminal: coefficients as bars to the right and to the left of zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from edgelora.cli.console import clean

_MAX_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_POSITIVE, _NEGATIVE = Style(color="green"), Style(color="red")


@dataclass(frozen=True)
class _Bar:
    """One value between `low` <= 0 and `high` >= 0, drawn from zero; whole cells to the left."""

    value: float
    low: float
    high: float

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(8, _MAX_BAR)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _MAX_BAR)
        span = (self.high - self.low) or 1.0
        left = round(-self.low / span * width)  # divided first: either may be near the largest
        n_cells = abs(self.value) / span * width
        block = "#" if options.ascii_only else "█"
        if self.value < 0:
            n = min(left, max(1, round(n_cells)))
            yield Segment(" " * (left - n))
            yield Segment(block * n, _NEGATIVE)
        else:
            whole = min(width - left, int(n_cells))
            part = int((n_cells - whole) * 8) if whole < width - left else 0
            yield Segment(" " * left)
            yield Segment(block * whole, _POSITIVE)
            if part and not options.ascii_only:
                yield Segment(_EIGHTHS[part], _POSITIVE)


def coefficients_chart(names: Sequence[str], coefficients: Sequence[float]) -> RenderableType:
    """One row for each adapter: name, coefficient, bar; bars of one scale share one zero.

    Args:
        names: printed as plain text, control characters replaced: they may come from a file.
        coefficients: one for each name; one that is not finite gets no bar.
    """
    finite = [c for c in coefficients if math.isfinite(c)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, overflow="ellipsis")  # so that the bars give way, not names
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for name, coefficient in zip(names, coefficients, strict=True):
        drawn = coefficient if math.isfinite(coefficient) else 0.0
        table.add_row(Text(clean(name)), f"{coefficient:+.3f}", _Bar(drawn, low, high))
    return table
