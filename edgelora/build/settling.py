"""What a build settles before it measures: the parts, the pool, how coefficients are found."""

from __future__ import annotations

from dataclasses import dataclass

from edgelora.build.automatic import settle_refinement
from edgelora.build.gradients import Opened
from edgelora.build.narrowing import narrow_to_time
from edgelora.build.proposals import Nearness
from edgelora.build.samples import split_for
from edgelora.build.work import Parts, Work, tokenise_parts
from edgelora.datasets.records import Dataset
from edgelora.datasets.split import Split


@dataclass(frozen=True, eq=False)
class Settled:
    """What is settled.

    Attributes:
        parts: of the split, with all their examples.
        nearness: the distances that the pool was narrowed by, if it was.
        opened: what gradients take, if it was opened to settle on them.
    """

    split: Split
    parts: Parts
    nearness: Nearness | None
    opened: Opened | None


def settle(work: Work, dataset: Dataset) -> Settled:
    """Settle the parts, and put the pool and the refinement in `work`.

    Where `auto` comes to do without gradients the parts are those of a build without them, unless
    the pool was narrowed by examples that would then be untouched.
    """
    split = split_for(work, dataset)
    parts = tokenise_parts(work, split)
    nearness = narrow_to_time(work, split, parts)
    opened = settle_refinement(work, parts)
    again = split_for(work, dataset)
    if nearness is None and again != split:
        split, parts = again, tokenise_parts(work, again)
    return Settled(split, parts, nearness, opened)
