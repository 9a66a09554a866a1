"""Every arm by its name: what makes it, what it takes, and what its result depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from gradient_quality import arms as gradient_arms

from edgelora.build import Options
from edgelora.build.proposals import OPERATOR_NAMES
from operators_benchmark import controls, ours
from operators_benchmark.bench import Bench, Made
from operators_benchmark.lorahub import make_lorahub
from operators_benchmark.paper import DISTANCES, HEADS, make_cell

# What of the support lines an arm uses. One that uses nothing is measured once for all numbers of
# labels; one that uses labels is not measured without them.
NOTHING, PROMPTS, LABELS = "nothing", "prompts", "labels"
# Operators alone, on all support lines, by what they use. Any other of `build` is measured as
# `build operator=NAME`, which parts the lines and lets the base stay.
ALONE = {"mixture": PROMPTS, "attentional": PROMPTS, "normalized": PROMPTS, "topk": PROMPTS,
         "gibbs": LABELS, "surrogate": LABELS}  # fmt: skip
_ELSEWHERE = {"auto", "none", "uniform", "nearest", "neural", "normalized_fixed"}


@dataclass(frozen=True)
class Entry:
    """One arm before its settings.

    Attributes:
        uses: NOTHING, PROMPTS or LABELS.
        has_bank: whether the bank plays a part; if not, it is measured once for all splits.
        takes: settings that its name may carry, `name key=value`.
    """

    make: Callable[..., Made]
    uses: str = PROMPTS
    has_bank: bool = True
    takes: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Arm:
    """An arm with its settings, under the name that its lines carry."""

    name: str
    make: Callable[[Bench], Made]
    uses: str
    has_bank: bool

    def labels(self, n_labels: int) -> int | None:
        """The number of labels that its line carries; None where it depends on none."""
        return None if self.uses == NOTHING else n_labels

    def split(self, split: str) -> str | None:
        """The split that its line carries; None where there is nothing to hide."""
        return split if self.has_bank else None


def _entries() -> dict[str, Entry]:
    found = {
        "base": Entry(controls.make_base, NOTHING, has_bank=False),
        "own": Entry(controls.make_own, NOTHING, has_bank=False),
        "uniform": Entry(controls.make_uniform, NOTHING, takes=frozenset({"combine", "rank"})),
        "mean": Entry(controls.make_mean),
        "nearest": Entry(controls.make_nearest, takes=frozenset({"distance"})),
        "random": Entry(controls.make_random, takes=frozenset({"n"})),
        "shuffled": Entry(controls.make_shuffled),
        "oracle-single": Entry(controls.make_oracle, NOTHING),
        "ceiling": Entry(
            controls.make_ceiling, NOTHING, takes=frozenset({"weights", "n", "n_passes"})
        ),
        "in-context": Entry(controls.make_in_context, LABELS, has_bank=False),
        "lorahub": Entry(
            make_lorahub, LABELS, takes=frozenset({"n_adapters", "n_steps", "combine"})
        ),
        "build": Entry(ours.make_build, takes=frozenset(f.name for f in fields(Options))),
    }
    for distance in DISTANCES:
        for head in HEADS:
            cell = partial(make_cell, distance=distance, head=head)
            found[f"paper-{distance}-{head}"] = Entry(cell, takes=frozenset({"combine"}))
    for operator, uses in ALONE.items():
        found[f"op-{operator}"] = Entry(partial(ours.make_operator, operator=operator), uses)
    return found


ENTRIES: dict[str, Entry] = _entries()
PAPER = [name for name in ENTRIES if name.startswith("paper-")]
OURS = [
    *(name for name in ENTRIES if name.startswith("op-")),
    *(f"build operator={n}" for n in OPERATOR_NAMES if n not in _ELSEWHERE | ALONE.keys()),
]
GROUPS: dict[str, list[str]] = {
    "@controls": ["uniform", "mean", "nearest", "random", "shuffled"],
    "@paper": PAPER,
    "@exact": [f"{name} combine=exact" for name in PAPER],
    "@oracles": ["oracle-single", "ceiling"],
    "@others": ["lorahub", "few-3", "few-10", "in-context"],
    "@ours": [
        *OURS,
        *("forward", "gradient-cv", "gradient-10", "polish-10 n_passes=5"),
        *("build", "build refine=forward", "build polish=5"),
    ],
    "@ranks": [f"uniform combine=svd rank={rank}" for rank in (8, 16, 32, 64)]
    + ["uniform combine=svd", "uniform combine=linear"],
    "@few": [
        *("base", "own", "mean", "nearest", "build", "build polish=5", "ceiling"),
        *("few-3", "few-10"),
    ],
}


def parse_arm(name: str) -> Arm:
    """An arm by its name and settings; arms of the gradient benchmark go by their names there.

    Raises:
        ValueError: an unknown arm or setting.

    Example:
        >>> parse_arm("paper-js-normalized combine=exact").uses
        'prompts'
    """
    head, *words = name.split()
    entry = ENTRIES.get(head)
    if entry is None:
        try:
            gradient_arms.parse_arm(name)
        except ValueError as error:
            raise ValueError(f"{error}; and here {', '.join(ENTRIES)}") from None
        make = partial(ours.make_by_gradients, name=name)
        return Arm(name, make, LABELS, has_bank=not head.startswith("few"))
    settings = _settings(words)
    if unknown := settings.keys() - entry.takes:
        raise ValueError(f"{name!r}: no setting {', '.join(sorted(unknown))}")
    return Arm(name, partial(entry.make, **settings), entry.uses, entry.has_bank)


def expand(names: Iterable[str]) -> list[Arm]:
    """Arms by names and groups, base and own first: every other is compared with these.

    Raises:
        ValueError: see parse_arm.
    """
    flat = [name for word in names for name in GROUPS.get(word, [word])]
    return [parse_arm(name) for name in dict.fromkeys(["base", "own", *flat])]


def _settings(words: Iterable[str]) -> Mapping[str, Any]:
    pairs = (word.partition("=") for word in words)
    return {key: gradient_arms.value_of(text) for key, _, text in pairs}
