"""Factors by gradients: LoRA fine-tuning that begins with a combination, or from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgelora.adapters.gguf_lora import PairPlan, Scalar, open_lora, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.adapters.merge import MergeReport
from edgelora.adapters.provenance import PROVENANCE_KEY
from edgelora.build.choosing import without_each_fold
from edgelora.build.crossing import assign_folds
from edgelora.build.finish import own_facts, write_trial
from edgelora.build.gradients import Gradients, make_fresh_pairs, threads
from edgelora.build.proposals import Nearness
from edgelora.build.records import Trained
from edgelora.build.refining import FACTORS, Teller, ask_to_keep, progress_stage
from edgelora.build.state import State
from edgelora.build.trials import HeldOut, Trial
from edgelora.build.work import Work
from edgelora.engine.score import TokenisedExample
from edgelora.gradient.minimise import Interrupted
from edgelora.gradient.polish import Polished, polish
from edgelora.operators.arbiter import Candidate

FRESH_NAME = "few-shot LoRA"


def train_factors(
    work: Work,
    gradients: Gradients,
    start: Trial | None,
    nearness: Nearness | None,
    state: State,
    folder: Path,
    *,
    is_crossed: bool = False,
) -> tuple[Trial, Trained]:
    """Train the factors of a trial, or those of a new LoRA.

    Args:
        is_crossed: train them without each fold too, from what the trial is without it, for a
            comparison by cross-validation.

    Ctrl-C: see refining.refine.

    Raises:
        EdgeLoRAError: a loss that is not a number.
        KeyboardInterrupt: see refining.refine.
    """
    training = _Training(work, gradients, nearness, state, folder)
    if start is None:
        candidate = Candidate(FRESH_NAME, np.zeros(len(work.pool.records)))
    else:
        name, scale = f"{start.candidate.name}, polished", start.candidate.scale
        candidate = Candidate(name, start.candidate.coefficients * scale)
    begun, path = training.begin(start, "to-polish"), folder / "polished.gguf"
    found = training.run(begun, gradients.examples)
    trained = Trained(
        start=start.candidate.name if start else "",
        n_examples=len(gradients.examples),
        n_passes=found.n_passes,
        support_losses=found.support_losses,
    )
    _write(work, found, _told(begun.facts, trained, candidate.name), path)
    held_out = tuple(training.without_folds(start)) if is_crossed else ()
    training.end()
    return Trial(candidate, path, is_final=True, merge=begun.merge, held_out=held_out), trained


@dataclass(frozen=True, eq=False)
class _Begun:
    """Factors to begin with, what their file tells, and how they were combined."""

    pairs: Mapping[str, LoraPair]
    facts: Mapping[str, Scalar]
    merge: MergeReport | None = None


class _Training:
    """The trainings of one build: of all its examples, and without each fold."""

    def __init__(
        self,
        work: Work,
        gradients: Gradients,
        nearness: Nearness | None,
        state: State,
        folder: Path,
    ) -> None:
        assert gradients.polish is not None
        self._work, self._gradients, self._options = work, gradients, gradients.polish
        self._nearness, self._state, self._folder = nearness, state, folder
        self._n_tokens = 0

    def begin(self, trial: Trial | None, name: str) -> _Begun:
        """A trial as it would be written, to a file of this name, or a new LoRA."""
        if trial is None:
            return _Begun(make_fresh_pairs(self._work, self._gradients), _scratch(self._work))
        path = self._folder / f"{name}.gguf"
        merge = write_trial(self._work, trial, self._nearness, path)
        lora = open_lora(path)
        facts = {key: v for key, v in lora.metadata.items() if key.startswith("edgelora.")}
        return _Begun({pair.name: pair for pair in lora.pairs()}, facts, merge)

    def run(self, begun: _Begun, examples: Sequence[TokenisedExample]) -> Polished:
        """Train on these examples; what is kept of it is kept by what decides its course."""
        work, options, gradients = self._work, self._options, self._gradients
        pairs = begun.pairs.values()
        factors = [factor for pair in pairs for factor in (pair.lora_a, pair.lora_b)]
        identity, course = work.model.base.identity.id, replace(options, n_passes=0)
        path = self._state.path(FACTORS, identity, *factors, examples, course)
        tell = Teller(
            work,
            FACTORS,
            options.n_passes,
            gradients.reserved.n_polish_tokens,
            n_before=self._n_tokens,
        )
        try:
            with threads(work):
                found = polish(
                    gradients.decoder, begun.pairs, examples, options,
                    passes=gradients.passes, listen=tell, checkpoint=path,
                )  # fmt: skip
        except Interrupted as stopped:
            if not ask_to_keep(work, FACTORS, stopped.best.n_passes):
                raise
            found = stopped.best
        self._n_tokens += found.n_tokens
        return found

    def without_folds(self, start: Trial | None) -> Iterator[HeldOut]:
        """Trained without each fold of the examples, from what the start is without it."""
        examples = self._gradients.examples
        for number, (positions, trial) in enumerate(self._starts(start)):
            if start is not None and trial is None:
                yield HeldOut(None, tuple(positions))
                continue
            seen = [examples[i] for i in range(len(examples)) if i not in positions]
            begun = self.begin(trial, f"to-polish-without-{number}")
            path = self._folder / f"polished-without-{number}.gguf"
            _write(self._work, self.run(begun, seen), begun.facts, path)
            yield HeldOut(path, tuple(positions))

    def end(self) -> None:
        """Give back what was set aside and not needed."""
        n_reserved = self._gradients.reserved.n_polish_tokens
        self._work.listener.progress(progress_stage(FACTORS), n_reserved, n_reserved)
        self._work.budget.give_back(n_reserved - self._n_tokens)

    def _starts(self, start: Trial | None) -> Iterator[tuple[list[int], Trial | None]]:
        examples, work = self._gradients.examples, self._work
        if start is not None:
            return without_each_fold(start, examples, work.pool.paths, self._folder)
        folds = assign_folds(examples)
        return ((np.flatnonzero(folds == fold).tolist(), None) for fold in np.unique(folds))


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
