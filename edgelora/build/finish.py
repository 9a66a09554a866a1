"""The end of a build: the chosen combination as a file, loaded and compared with the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgelora.adapters.merge import MergeReport, merge_adapters
from edgelora.bank.records import signature_path
from edgelora.build.proposals import Nearness
from edgelora.build.records import Judgement
from edgelora.build.trials import Trial
from edgelora.build.work import Parts, Work
from edgelora.engine.context import Context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import mean_loss, paired_interval, score
from edgelora.errors import NoImprovement
from edgelora.files import write_atomic


def write_trial(work: Work, trial: Trial, nearness: Nearness | None, path: Path) -> MergeReport:
    """Combine a trial's adapters as the options ask, with all that tells how it was made."""
    options, pool = work.options, work.pool
    used = np.flatnonzero(trial.candidate.coefficients)
    coefficients = trial.candidate.coefficients[used] * trial.candidate.scale
    provenance: dict[str, object] = {
        "operator": trial.candidate.name,
        "distance": options.distance if nearness else "",
        "distances": {
            pool.names[i]: round(float(nearness.distances[i]), 6)
            for i in used
            if nearness and np.isfinite(nearness.distances[i])
        },
        "seed": options.seed,
        "budget_tokens": options.budget_tokens,
    }
    return merge_adapters(
        [pool.paths[i] for i in used],
        [float(c) for c in coefficients],
        path,
        method=options.combine,
        rank=options.rank,
        dtype=options.dtype,
        metadata={"edgelora.template": work.template.key, "edgelora.name": work.out.stem},
        provenance=provenance,
    )


def keep_signature(work: Work, nearness: Nearness | None) -> None:
    """Keep the signature of the user's examples beside the adapter: a server's `auto` reads it.

    One that an overwritten adapter left is replaced or removed.
    """
    path = signature_path(work.out, work.model.base.identity.id)
    if nearness is None:
        path.unlink(missing_ok=True)
    else:
        write_atomic(path, nearness.target.to_bytes())


def judge(work: Work, context: Context, finished: Path, parts: Parts) -> Judgement:
    """The finished file, loaded, against the base.

    Raises:
        NoImprovement: the base is better there and force is off.
    """
    context.apply([])
    base = score(context, parts.judged)
    with applied(context, finished):
        adapter = score(context, parts.judged)
    judgement = Judgement(
        parts.part,
        len(parts.judged),
        mean_loss(base),
        mean_loss(adapter),
        paired_interval(adapter, base, work.options.seed),
    )
    if judgement.adapter_loss < judgement.base_loss:
        return judgement
    message = (
        f"the finished adapter is no better than the base on the {judgement.n_examples} examples "
        f"({parts.part}): {judgement.adapter_loss:.4f} against {judgement.base_loss:.4f} nats"
    )
    if not work.options.force:
        raise NoImprovement(message, hint="It was deleted. --force keeps it all the same.")
    work.warn(message)
    return judgement


@contextmanager
def applied(context: Context, path: Path) -> Iterator[None]:
    """Apply one file for the block, then let go of it, so that it can be renamed or deleted."""
    context.apply([WeightedAdapter(path)])
    try:
        yield
    finally:
        context.apply([])
        context.model.unload(path)
