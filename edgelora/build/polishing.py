"""Factors by gradients: LoRA fine-tuning that begins with a combination, or from scratch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgelora.adapters.gguf_lora import PairPlan, Scalar, open_lora, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.adapters.merge import MergeReport
from edgelora.adapters.provenance import PROVENANCE_KEY
from edgelora.build.finish import own_facts, write_trial
from edgelora.build.gradients import Gradients, make_fresh_pairs, threads
from edgelora.build.proposals import Nearness
from edgelora.build.records import Trained
from edgelora.build.refining import FACTORS, Teller, ask_to_keep
from edgelora.build.state import State
from edgelora.build.trials import Trial
from edgelora.build.work import Work
from edgelora.gradient.minimise import Interrupted
from edgelora.gradient.polish import Polished, PolishOptions, polish
from edgelora.operators.arbiter import Candidate

FRESH_NAME = "few-shot LoRA"


def train_factors(
    work: Work,
    gradients: Gradients,
    start: Trial | None,
    nearness: Nearness | None,
    state: State,
    folder: Path,
) -> tuple[Trial, Trained]:
    """Train the factors of a trial, or those of a new LoRA.

    Ctrl-C: see refining.refine.

    Raises:
        EdgeLoRAError: a loss that is not a number.
        KeyboardInterrupt: see refining.refine.
    """
    options = gradients.polish
    assert options is not None
    if start is None:
        pairs, facts, merge = make_fresh_pairs(work, gradients), _scratch(work), None
        candidate = Candidate(FRESH_NAME, np.zeros(len(work.pool.records)))
    else:
        pairs, facts, merge = _combined(work, start, nearness, folder / "to-polish.gguf")
        name, scale = f"{start.candidate.name}, polished", start.candidate.scale
        candidate = Candidate(name, start.candidate.coefficients * scale)
    with threads(work):
        found = _train(work, gradients, options, pairs, state)
    trained = Trained(
        start=start.candidate.name if start else "",
        n_examples=len(gradients.examples),
        n_passes=found.n_passes,
        support_losses=found.support_losses,
    )
    path = folder / "polished.gguf"
    _write(work, found, _told(facts, trained, candidate.name), path)
    return Trial(candidate, path, is_final=True, merge=merge), trained


def _combined(
    work: Work, trial: Trial, nearness: Nearness | None, path: Path
) -> tuple[dict[str, LoraPair], dict[str, Scalar], MergeReport | None]:
    """The factors of a combination as it would be written, and what its file tells."""
    merge = write_trial(work, trial, nearness, path)
    lora = open_lora(path)
    facts = {key: v for key, v in lora.metadata.items() if key.startswith("edgelora.")}
    return {pair.name: pair for pair in lora.pairs()}, facts, merge


def _train(
    work: Work,
    gradients: Gradients,
    options: PolishOptions,
    pairs: Mapping[str, LoraPair],
    state: State,
) -> Polished:
    factors = [factor for pair in pairs.values() for factor in (pair.lora_a, pair.lora_b)]
    course = replace(options, n_passes=0)
    identity = work.model.base.identity.id
    path = state.path(FACTORS, identity, *factors, gradients.examples, course)
    tell = Teller(work, FACTORS, options.n_passes, gradients.n_polish_tokens)
    try:
        found = polish(
            gradients.decoder, pairs, gradients.examples, options,
            passes=gradients.passes, listen=tell, checkpoint=path,
        )  # fmt: skip
    except Interrupted as stopped:
        if not ask_to_keep(work, FACTORS, stopped.best.n_passes):
            raise
        found = stopped.best
    tell.end()
    work.budget.give_back(gradients.n_polish_tokens - found.n_tokens)
    return found


def _scratch(work: Work) -> dict[str, Scalar]:
    """What the file of an adapter that was combined from nothing tells."""
    facts, options = own_facts(work), work.options
    account: dict[str, object] = {
        "tool": facts["edgelora.created_by"],
        "method": "trained",
        "sources": [],
        "seed": options.seed,
        "budget_tokens": work.budget.n_tokens,
        "base": work.model.base.identity.id,
        "template": work.template.key,
    }
    return facts | {PROVENANCE_KEY: json.dumps(account, ensure_ascii=False)}


def _told(facts: Mapping[str, Scalar], trained: Trained, name: str) -> dict[str, Scalar]:
    """The facts with an account of the training in their provenance.

    Errors are those of the combination that training began with: they become a part of it.
    """
    account = json.loads(str(facts[PROVENANCE_KEY]))
    error = account.pop("error", None)
    for tensor in account.get("tensors", {}).values():
        tensor.pop("error", None)
    account["operator"] = name
    account["trained"] = {
        "from": trained.start or "scratch",
        "examples": trained.n_examples,
        "passes": trained.n_passes,
    } | ({} if error is None else {"error before": error})
    return {**facts, PROVENANCE_KEY: json.dumps(account, ensure_ascii=False)}


def _write(work: Work, found: Polished, facts: Mapping[str, Scalar], path: Path) -> None:
    pairs = list(found.pairs.values())
    plan = [
        PairPlan(pair.name, pair.rank, pair.lora_a.shape[1], pair.lora_b.shape[0]) for pair in pairs
    ]
    write_lora(
        path,
        plan,
        pairs,
        architecture=work.model.base.architecture,
        alpha=None,
        dtype=work.options.dtype,
        metadata=facts,
    )
