"""The end of a build: the chosen combination as a file, loaded and compared with the base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import Scalar, open_lora
from edgelora.adapters.merge import (
    BASE_PREFIX,
    FORMAT_VERSION,
    TOOL,
    MergeReport,
    merge_adapters,
)
from edgelora.bank.records import signature_path
from edgelora.build.alone import Measured
from edgelora.build.proposals import Nearness
from edgelora.build.records import CROSSED, Built, Judgement, count_steps
from edgelora.build.trials import Recipe, Trial
from edgelora.build.work import Parts, Work
from edgelora.engine.context import Context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import Score, mean_loss, open_for, paired_interval, score
from edgelora.errors import NoImprovement
from edgelora.files import publish, write_atomic
from edgelora.operators.arbiter import Candidate

Array = NDArray[np.float64]
PLAIN = Recipe({})


def write_trial(
    work: Work, trial: Trial, nearness: Nearness | None, path: Path
) -> MergeReport | None:
    """A trial as a file that tells how it was made; one that is final already is copied."""
    if trial.is_final:
        shutil.copyfile(trial.path, path)
        return trial.merge
    return write_combination(work, trial.candidate, nearness, path)


def write_combination(
    work: Work,
    candidate: Candidate,
    nearness: Nearness | None,
    path: Path,
    recipe: Recipe = PLAIN,
) -> MergeReport:
    """Combine a candidate's adapters as the options ask, with all that tells how it was made.

    Args:
        recipe: with coefficients for each tensor in place of the candidate's own.

    Raises:
        EdgeLoRAError: every coefficient is zero.
    """
    options, pool = work.options, work.pool
    rows = recipe.by_tensor or {"": candidate.coefficients * candidate.scale}
    used = np.flatnonzero(np.any([row.reshape(len(row), -1).any(1) for row in rows.values()], 0))
    paths = [pool.paths[i] for i in used]
    kept = {name: row[used] for name, row in rows.items()}
    coefficients = _own_tensors(kept, paths) if recipe.by_tensor else kept[""].tolist()
    return merge_adapters(
        paths,
        coefficients,
        path,
        method=options.combine,
        rank=options.rank,
        dtype=options.dtype,
        metadata={"edgelora.template": work.template.key, "edgelora.name": work.out.stem},
        provenance=_account(work, candidate, used.tolist(), nearness) | dict(recipe.told),
        progress=count_steps(
            "combining the chosen adapters, tensors",
            next((len(open_lora(path).plan) for path in paths), 0),
            work.listener.progress,
        ),
    )


def own_facts(work: Work) -> dict[str, Scalar]:
    """The metadata of an adapter that inherits none."""
    identity = work.model.base.identity
    return {
        "edgelora.format_version": FORMAT_VERSION,
        "edgelora.name": work.out.stem,
        "edgelora.template": work.template.key,
        f"{BASE_PREFIX}id": identity.id,
        f"{BASE_PREFIX}architecture": identity.architecture,
        f"{BASE_PREFIX}shapes": identity.shapes,
        f"{BASE_PREFIX}tokenizer": identity.tokenizer,
        f"{BASE_PREFIX}norms": identity.norms,
        "edgelora.created_by": TOOL,
    }


def _own_tensors(rows: Mapping[str, Array], paths: Sequence[Path]) -> Mapping[str, Array]:
    """Without the tensors that none of these adapters updates."""
    names = {name for path in paths for name in open_lora(path).plan}
    return {name: row for name, row in rows.items() if name in names}


def _account(
    work: Work, candidate: Candidate, used: Sequence[int], nearness: Nearness | None
) -> dict[str, object]:
    options, names = work.options, work.pool.names
    calibration = work.pool.calibration
    return {
        "operator": candidate.name,
        "distance": options.distance if nearness else "",
        "distances": {
            names[i]: round(float(nearness.distances[i]), 6)
            for i in used
            if nearness and np.isfinite(nearness.distances[i])
        },
        "seed": options.seed,
        "budget_tokens": work.budget.n_tokens,
    } | ({"calibrated on": calibration.evidence} if calibration else {})


def keep_signature(work: Work, nearness: Nearness | None) -> None:
    """Keep the signature of the user's examples beside the adapter: a server's `auto` reads it.

    One that an overwritten adapter left is replaced or removed.
    """
    path = signature_path(work.out, work.model.base.identity.id)
    if nearness is None:
        path.unlink(missing_ok=True)
    else:
        write_atomic(path, nearness.target.to_bytes())


def publish_unjudged(
    work: Work, nearness: Nearness | None, write: Callable[[Path], MergeReport | None]
) -> MergeReport | None:
    """Publish what `write` makes where no examples are there to judge it, and the signature.

    Loading it is the check: a file that llama.cpp refuses is not published.
    """
    with publish(work.out, force=work.options.force) as temporary:
        merge = write(temporary)
        with open_for(work.model, []) as context, applied(context, temporary):
            pass
        keep_signature(work, nearness)
    return merge


def judge(
    work: Work, context: Context, finished: Path, parts: Parts, compared: list[Score]
) -> Judgement:
    """The finished file, loaded, against the base.

    Args:
        compared: the base's scores in the choice, which count where it was made on these examples.

    Raises:
        NoImprovement: the base is better there and force is off.
    """
    base = compared
    if not parts.is_optimistic:
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
    where = "that it was found with" if parts.is_crossed else parts.part
    message = (
        f"the finished adapter is no better than the base on the {judgement.n_examples} examples "
        f"({where}): {judgement.adapter_loss:.4f} against {judgement.base_loss:.4f} nats"
    )
    if not work.options.force:
        raise NoImprovement(message, hint="It was deleted. --force keeps it all the same.")
    work.warn(message)
    return judgement


def crossed_judgement(scores: list[Score], base: list[Score], seed: int) -> Judgement:
    """The chosen candidate against the base as cross-validation has them.

    The finished file has seen all examples, so that its own losses on them would flatter it.
    """
    return Judgement(
        CROSSED,
        len(scores),
        mean_loss(base),
        mean_loss(scores),
        paired_interval(scores, base, seed),
    )


@contextmanager
def applied(context: Context, path: Path) -> Iterator[None]:
    """Apply one file for the block, then let go of it, so that it can be renamed or deleted."""
    context.apply([WeightedAdapter(path)])
    try:
        yield
    finally:
        context.apply([])
        context.model.unload(path)


def make_built(
    work: Work,
    trial: Trial,
    nearness: Nearness | None,
    measured: Measured | None,
    support_losses: dict[str, float],
    merge: MergeReport | None,
) -> Built:
    """The account of a finished build; warnings of the merge are told."""
    names, candidate = work.pool.names, trial.candidate
    for message in merge.warnings if merge else ():
        if message not in work.warnings:  # an earlier build may have told it
            work.warn(message)
    distances = nearness.distances if nearness else np.full(len(names), np.inf)
    alone = zip(measured.positions, measured.losses, strict=True) if measured else ()
    return Built(
        out=work.out,
        chosen=candidate.name,
        coefficients={
            names[i]: float(candidate.coefficients[i] * candidate.scale)
            for i in np.flatnonzero(candidate.coefficients)
        },
        distances={n: float(d) for n, d in zip(names, distances, strict=True) if np.isfinite(d)},
        losses_alone={names[i]: float(loss) for i, loss in alone},
        support_losses=support_losses,
        verdict=None,
        judgement=None,
        merge=merge,
        n_tokens=work.budget.n_used,
        seconds=work.clock.stages(),
        warnings=tuple(work.warnings),
        plan=work.clock.plan,
        planned_s=work.clock.planned_s,
    )
