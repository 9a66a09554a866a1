"""This project's operators: each alone on all support lines, and the whole of `edgelora build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gradient_quality import arms as gradient_arms

from edgelora.build import Options
from edgelora.build.proposals import ON_LOSSES, propose
from edgelora.datasets.records import Dataset
from edgelora.engine.model import WeightedAdapter
from edgelora.leave_one_out.arms import build_without
from operators_benchmark.bench import Bench, Made


def make_operator(bench: Bench, *, operator: str) -> Made:
    """What an operator of `build` proposes, at the best scale; of several the least support loss.

    Costs are those of the operator alone, on all support lines and all adapters.
    """
    on_losses = operator in ON_LOSSES
    measured = bench.measured() if on_losses else None
    nearness = None if on_losses else bench.nearness()
    found = propose(bench.pool, nearness, measured, operator)
    made = [bench.scaled(name, coefficients) for name, coefficients in found]
    return min(made, key=lambda one: one.facts.get("support_loss", 0.0))


def make_build(bench: Bench, **options: Any) -> Made:
    """`edgelora build` as a person runs it: part of the lines proposes, part chooses, and the base
    stays where nothing beats it.

    Args:
        options: fields of build.Options.
    """
    case, bed = bench.case, bench.case.bed
    out, chosen = bench.new_folder() / "built.gguf", Options(**{"seed": case.seed, **options})
    data = Dataset(Path(case.task), "drawn", case.support, ())
    kin = bed.hidden(case.task, case.split)
    built, n_tokens = build_without(kin, bed.model, bed.bank, data, bed.template, out, chosen)
    bench.meter.spend(n_tokens)
    if built is None:
        return Made([], {"chosen": "base"}, np.zeros(bench.k))
    found = np.array([built.coefficients.get(name, 0.0) for name in bench.pool.names])
    facts: dict[str, Any] = {"chosen": built.chosen}
    if built.merge is not None:
        facts["rank"] = built.merge.max_rank
    return Made([WeightedAdapter(out)], facts, found)


def make_by_gradients(bench: Bench, *, name: str) -> Made:
    """An arm of scripts/benchmark_gradient_quality.py by its name there."""
    made = gradient_arms.parse_arm(name)(bench.for_gradients(name))
    bench.meter.spend(made.n_tokens)
    return Made(made.adapters, made.facts)
