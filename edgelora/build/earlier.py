"""What a build found, kept by the hash of all that it depends on: the same one starts at the merge.

Only what measured losses chose among sums of the bank's adapters, and what beat the base: not what
was trained, nor what a person had interrupted.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora import __version__
from edgelora.build.finish import PLAIN, make_built, publish_unjudged, write_combination
from edgelora.build.kept import Shelf
from edgelora.build.measuring import plan_repeated
from edgelora.build.pool import Pool
from edgelora.build.proposals import Nearness
from edgelora.build.records import Built, Judgement, Refined
from edgelora.build.trials import Budget, Recipe, Trial
from edgelora.build.work import Work
from edgelora.datasets.records import Example
from edgelora.engine.native import version as llama_cpp_version
from edgelora.errors import InvalidFile
from edgelora.operators.arbiter import Candidate, Row, Verdict
from edgelora.signature import from_bytes

BUILDS = Shelf("builds", ".json", 32 << 20)
_FORMAT = 6  # also where the same build would find something else
# Its weights are in a file of the bank that the key does not cover.
_NOT_KEPT = "neural"
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError, InvalidFile)
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Earlier:
    """The end of an earlier build.

    Attributes:
        pool: the adapters that took part.
        candidate, recipe: what was chosen.
        budget_tokens: that the earlier build had.
        warnings: that it gave.
    """

    pool: Pool
    candidate: Candidate
    recipe: Recipe
    nearness: Nearness | None
    verdict: Verdict
    judgement: Judgement
    refined: Refined | None
    losses_alone: dict[str, float]
    support_losses: dict[str, float]
    budget_tokens: int
    warnings: tuple[str, ...]


def recall(work: Work, examples: Sequence[Example]) -> Earlier | None:
    """What an equal build found on this machine; `work` gets its budget. None: nothing is kept.

    Raises:
        EdgeLoRAError: the cache cannot be used.
    """
    if not _is_kept(work):
        return None
    key = _key(work, examples)
    data = BUILDS.read(key)
    if data is None:
        return None
    try:
        found = _unpack(json.loads(data), work.whole)
    except _MALFORMED:
        BUILDS.discard(key)
        return None
    work.pool, work.budget = found.pool, Budget(found.budget_tokens)
    for message in found.warnings:
        if message not in work.warnings:
            work.warn(message)
    return found


def remember(
    work: Work,
    examples: Sequence[Example],
    built: Built,
    trial: Trial,
    nearness: Nearness | None,
) -> None:
    """Keep the end of a build, unless only --force had it written.

    Raises:
        EdgeLoRAError: the cache cannot be used.
    """
    judged, verdict = built.judgement, built.verdict
    if not _is_kept(work) or judged is None or verdict is None or verdict.chosen is None:
        return
    if judged.adapter_loss >= judged.base_loss:
        return
    candidate = trial.candidate
    told = {
        "taking part": _positions(work.pool, work.whole),
        "chosen": candidate.name,
        "coefficients": candidate.coefficients.tolist(),
        "scale": candidate.scale,
        "position": verdict.position,
        "base_loss": verdict.base_loss,
        "table": [asdict(row) for row in verdict.table],
        "reasons": verdict.reasons,
        "judgement": asdict(judged),
        "losses_alone": built.losses_alone,
        "support_losses": built.support_losses,
        "budget_tokens": work.budget.n_tokens,
        "warnings": work.warnings,
        "nearness": _pack_nearness(nearness),
        "recipe": trial.recipe and _pack_recipe(trial.recipe),
        "refined": built.refined and asdict(built.refined),
    }
    data = json.dumps(told).encode()
    BUILDS.keep(_key(work, examples), len(data), lambda path: path.write_bytes(data))


def build_again(work: Work, earlier: Earlier) -> Built:
    """The file of a build whose end is known: nothing is measured again."""
    candidate, nearness = earlier.candidate, earlier.nearness
    work.listener.plan(plan_repeated(work))
    write = partial(write_combination, work, candidate, nearness, recipe=earlier.recipe)
    merge = publish_unjudged(work, nearness, write)
    trial = Trial(candidate, work.out)
    built = make_built(work, trial, nearness, None, earlier.support_losses, merge)
    return replace(
        built, losses_alone=earlier.losses_alone, verdict=earlier.verdict,
        judgement=earlier.judgement, refined=earlier.refined,
    )  # fmt: skip


def _is_kept(work: Work) -> bool:
    options = work.options
    is_whole = not work.was_interrupted and not options.polish
    return options.reuse and is_whole and options.operator != _NOT_KEPT


def _key(work: Work, examples: Sequence[Example]) -> str:
    """Of the base, the bank, the examples, the options, and what the last bits depend on."""
    base, options, pool = work.model.base, replace(work.asked, force=False), work.whole
    opened = work.model.options
    facts = {
        "format": [_FORMAT, __version__, llama_cpp_version(), np.__version__],
        "base": [base.identity.id, base.path.stat().st_size],
        "engine": [opened.threads(), opened.low_ram],
        "options": asdict(options),
        "template": work.template.key,
        "bank": list(zip(pool.names, pool.hashes, strict=True)),
        "signatures": [
            hashlib.sha256(s.to_bytes()).hexdigest() if s else None for s in pool.signatures
        ],
        "calibration": asdict(pool.calibration) if pool.calibration else None,
        "examples": [
            [[(m.role, m.content) for m in example.messages], example.completion]
            for example in examples
        ],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _pack_nearness(nearness: Nearness | None) -> dict[str, Any] | None:
    if nearness is None:
        return None
    target = base64.b64encode(nearness.target.to_bytes()).decode()
    distances = nearness.distances.tolist()
    return {"distance": nearness.distance, "target": target, "distances": distances}


def _pack_recipe(recipe: Recipe) -> dict[str, Any]:
    """Coefficients as float16, which is what they are rounded to; adapters without any left out."""
    used = sorted({int(i) for row in recipe.by_tensor.values() for i in np.nonzero(row)[0]})
    rows = {}
    for name, row in recipe.by_tensor.items():
        values = base64.b64encode(row[used].astype(np.float16).tobytes())
        rows[name] = [list(row.shape[1:]), values.decode()]
    return {"told": dict(recipe.told), "used": used, "rows": rows}


def _unpack_recipe(told: Mapping[str, Any], k: int) -> Recipe:
    used, rows = [int(i) for i in told["used"]], {}
    if not used or min(used) < 0 or max(used) >= k:
        raise ValueError(f"adapters {used} of {k}")
    for name, (shape, text) in told["rows"].items():
        values = np.frombuffer(base64.b64decode(text), np.float16).reshape(len(used), *shape)
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: coefficients that are no numbers")
        rows[name] = np.zeros((k, *shape))
        rows[name][used] = values
    return Recipe(dict(told["told"]), rows)


def _refined(told: Mapping[str, Any]) -> Refined:
    losses = {name: tuple(told[name]) for name in ("support_losses", "held_out_losses")}
    return Refined(**{**told, **losses})


def _unpack(told: Mapping[str, Any], pool: Pool) -> Earlier:
    """What `remember` kept; raises one of _MALFORMED for anything else."""
    pool = pool.only(_checked(told["taking part"], len(pool.records)))
    k, near, judged = len(pool.records), told["nearness"], dict(told["judgement"])
    judged["interval"] = tuple(judged["interval"])
    candidate = Candidate(told["chosen"], _array(told["coefficients"], k), float(told["scale"]))
    return Earlier(
        pool,
        candidate,
        _unpack_recipe(told["recipe"], k) if told["recipe"] else PLAIN,
        near and Nearness(near["distance"], from_bytes(base64.b64decode(near["target"])),
                          _array(near["distances"], k)),
        Verdict(candidate, told["position"], told["base_loss"],
                tuple(Row(**row) for row in told["table"]), tuple(told["reasons"])),
        Judgement(**judged),
        _refined(told["refined"]) if told["refined"] else None,
        told["losses_alone"],
        told["support_losses"],
        int(told["budget_tokens"]),
        tuple(told["warnings"]),
    )  # fmt: skip


def _positions(pool: Pool, whole: Pool) -> list[int]:
    """Where the adapters of a pool are in the one that it is a part of."""
    place = {name: i for i, name in enumerate(whole.names)}
    return [place[name] for name in pool.names]


def _checked(positions: Sequence[int], k: int) -> list[int]:
    if not positions or positions != sorted({*map(int, positions)} & set(range(k))):
        raise ValueError(f"adapters {positions} of {k}")
    return list(positions)


def _array(values: Sequence[float], k: int) -> Array:
    found = np.array(values, np.float64)
    if found.shape != (k,):
        raise ValueError(f"{found.shape} for {k} adapters")
    return found
