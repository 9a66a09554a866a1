"""Coefficients by activations: LoGo and Arrow, which need neither completions nor signatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.adapters.provenance import mean_coefficient
from edgelora.build.finish import write_combination
from edgelora.build.gradients import open_decoder_and_adapters, threads
from edgelora.build.proposals import ACTIVATED, Nearness
from edgelora.build.records import count_steps
from edgelora.build.samples import sampled
from edgelora.build.trials import NEGLIGIBLE, Recipe, Trial, try_scales
from edgelora.build.work import Work
from edgelora.engine.score import TokenisedExample, open_for
from edgelora.gradient.activations import prompts_of, weigh_adapters
from edgelora.gradient.decoder import Decoder, PassOptions
from edgelora.operators.arbiter import Candidate

Array = NDArray[np.float64]
_STAGE = "activations of the base, blocks"


@dataclass(frozen=True, eq=False)
class Activations:
    """The base opened for one forward pass over prompts, whose tokens are paid for.

    Attributes:
        operator: which of proposals.ACTIVATED weighs by them.
        adapters: the pool's files.
        prompts: at most samples.MAX_EXAMPLES of the support part.
    """

    operator: str
    decoder: Decoder
    adapters: list[LoraFile]
    prompts: list[TokenisedExample]


def open_activations(
    work: Work, operator: str, examples: Sequence[TokenisedExample]
) -> Activations | None:
    """None where the operator needs none.

    Raises:
        UnsupportedFile: a base, or an adapter, whose activations are not known; it is named.
        EdgeLoRAError: texts that are too long, or a budget too small for the pass.
    """
    if operator not in ACTIVATED:
        return None
    opened = open_decoder_and_adapters(
        work, f"The operator {operator} needs them. Choose --operator mixture or uniform."
    )
    prompts = prompts_of(sampled(examples, work.options.seed))
    n_tokens = opened.decoder.count_rows(prompts, PassOptions())
    work.spend(n_tokens, f"the activations of {len(prompts)} prompt(s)")
    return Activations(operator, opened.decoder, opened.adapters, prompts)


def weigh(work: Work, opened: Activations) -> dict[str, Array]:
    """The operator's coefficients for each tensor, (k,), the smallest left out.

    Raises:
        EdgeLoRAError: the operator finds nothing to weigh by.
    """
    n_packs = opened.decoder.count_packs(opened.prompts, PassOptions())
    n_blocks = n_packs * opened.decoder.base.n_layer
    with threads(work):
        found = weigh_adapters(
            opened.decoder,
            opened.adapters,
            opened.prompts,
            opened.operator,
            progress=count_steps(_STAGE, n_blocks, work.listener.progress),
        )
    return {n: np.where(row < NEGLIGIBLE * row.max(), 0.0, row) for n, row in found.items()}


def make_activated(
    work: Work,
    opened: Activations,
    weights: dict[str, Array],
    nearness: Nearness | None,
    folder: Path,
    scale: float = 1.0,
) -> Trial:
    """The combination as a file, written as it would be published.

    Coefficients are rounded to what a provenance holds, so that the file can be made again.
    """
    name = opened.operator
    rows = {n: (scale * row).astype(np.float16).astype(float) for n, row in weights.items()}
    names, table = list(rows), np.array(list(rows.values()))
    means = [mean_coefficient(table[:, i], names, f.ranks) for i, f in enumerate(opened.adapters)]
    recipe = Recipe({"prompts": len(opened.prompts)}, rows)
    candidate = Candidate(name, np.array(means))
    path = folder / f"{name}-{scale:g}.gguf"
    merge = write_combination(work, candidate, nearness, path, recipe)
    return Trial(candidate, path, is_final=True, merge=merge, recipe=recipe)


def try_activated(
    work: Work,
    opened: Activations,
    nearness: Nearness | None,
    shown: Sequence[TokenisedExample],
    folder: Path,
) -> Trial:
    """The combination at its best scale on the examples shown."""
    weights = weigh(work, opened)
    first = make_activated(work, opened, weights, nearness, folder)
    with open_for(work.model, shown) as context:
        tried = try_scales(context, first, shown, work.budget)
    if tried.candidate.scale == 1.0:
        return replace(first, loss=tried.loss)
    work.model.unload(first.path)
    best = make_activated(work, opened, weights, nearness, folder, tried.candidate.scale)
    return replace(best, loss=tried.loss)
