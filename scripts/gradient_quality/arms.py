"""What is compared: each arm makes an adapter file from a case, or says which one there is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.adapters.gguf_lora import PairPlan, open_lora, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.adapters.merge import merge_adapters
from edgelora.build import proposals
from edgelora.build.trials import Budget, Trial, make_trial, try_scales
from edgelora.engine.context import Context, open_context
from edgelora.engine.hidden import head_matrix
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import count_tokens
from edgelora.gradient.checkpoint import fingerprint, from_bytes
from edgelora.gradient.decoder import PassOptions
from edgelora.gradient.descent import Descended, DescentOptions, descend, rank_adapters
from edgelora.gradient.polish import PolishOptions, fresh_pairs, polish
from gradient_quality.bed import Case

UNLIMITED = 10**12
PASSES = PassOptions(keep_bytes=1 << 30)  # as `build` has it where memory allows


@dataclass(frozen=True, eq=False)
class Made:
    """What an arm made.

    Attributes:
        adapters: what llama.cpp applies; [] is the base.
        n_tokens: forward-equivalent tokens that it took.
        facts: what else the line of results says.
    """

    adapters: list[WeightedAdapter]
    n_tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Bench:
    """Where arms work: a case, a context for losses, a folder for files and checkpoints."""

    case: Case
    context: Context
    folder: Path

    def path(self, name: str) -> Path:
        """A file of this case."""
        return self.folder / re.sub(r"[^\w.=-]", "_", name)

    def state(self, n_passes: int, *parts: object) -> Path:
        """The checkpoint of one descent: arms of more passes go on with it, fewer begin anew."""
        path = self.path(f"{fingerprint(*parts)[:16]}.state")
        if path.exists() and from_bytes(path.read_bytes()).tally.in_pass - 1 > n_passes:
            path.unlink()
        return path


Arm = Callable[[Bench], Made]


def make_base(bench: Bench) -> Made:
    """The base alone."""
    return Made([])


def make_own(bench: Bench) -> Made:
    """The task's own adapter."""
    return Made([WeightedAdapter(bench.case.own)])


def make_mean(bench: Bench) -> Made:
    """The uniform mean at the scale that is best on the support examples."""
    k = len(bench.case.adapters)
    trial = make_trial("uniform mean", np.full(k, 1 / k), bench.case.pool.paths, bench.folder)
    budget = Budget(UNLIMITED)
    trial = try_scales(bench.context, trial, bench.case.texts, budget)
    return _of_trial(trial, budget.n_used)


def make_forward(bench: Bench) -> Made:
    """The best of `build`'s candidates without gradients, each at its best scale.

    Like `build`, it measures every adapter alone; the least loss on the support examples wins.
    """
    case, budget = bench.case, Budget(UNLIMITED)
    with open_context(case.bed.model, hidden=True) as context:
        nearness = proposals.find_nearness(context, case.pool, case.support, "bures", case.seed)
        base, _ = proposals.measure_base(context, case.texts)
        alone = proposals.measure_alone(
            context, case.pool.paths, case.texts, lambda done, total: None
        )
    head = head_matrix(case.bed.model)
    positions = list(range(len(alone)))
    measured = proposals.Measured(positions, proposals.losses_of(alone, head), base, alone, head)
    budget.take((1 + len(alone)) * count_tokens(case.texts))
    trials = []
    for name, coefficients in proposals.propose(case.pool, nearness, measured, "auto"):
        trial = make_trial(name, coefficients, case.pool.paths, bench.folder)
        trials.append(try_scales(bench.context, trial, case.texts, budget))
        bench.context.apply([])
    return _of_trial(min(trials, key=lambda trial: trial.loss), budget.n_used)


def make_gradient(
    bench: Bench,
    *,
    scale: float = 1.0,
    n_sources: int = 0,
    rank: int | str = "auto",
    **options: Any,
) -> Made:
    """Coefficients by gradient descent from the uniform mean times `scale`.

    Args:
        n_sources: only so many adapters, those of the steepest slope at the start; 0 for all.
        rank: of the file; "cat" for the exact combination.
        options: see DescentOptions.
    """
    found, files, n_ranking = _descended(bench, scale, n_sources, options)
    return _merged(bench, files, found, rank, n_ranking)


def make_few(bench: Bench, *, rank: int = 16, **options: Any) -> Made:
    """A LoRA from scratch on the support examples, of the tensors that the bank adapts."""
    base = bench.case.bed.decoder.base
    pairs = fresh_pairs(base, rank, _modules(bench.case), seed=bench.case.seed)
    return _trained(bench, pairs, f"few-r{rank}", options, 0)


def make_polished(bench: Bench, *, n_first: int, rank: int | str = "auto", **options: Any) -> Made:
    """`n_first` passes on coefficients, the file cut to its rank, then passes on its factors."""
    found, files, n_ranking = _descended(bench, 1.0, 0, {"n_passes": n_first, "n_folds": 0})
    made = _merged(bench, files, found, rank, n_ranking)
    pairs = {pair.name: pair for pair in open_lora(made.adapters[0].path).pairs()}
    return _trained(bench, pairs, f"polish-{n_first}-{rank}", options, made.n_tokens)


def _descended(
    bench: Bench, scale: float, n_sources: int, options: Mapping[str, Any]
) -> tuple[Descended, list[int], int]:
    """What a descent found, the positions of the adapters it had, and the tokens of ranking."""
    case, n_ranking = bench.case, 0
    k = len(case.adapters)
    positions = list(range(k))
    chosen = DescentOptions(**{"seed": case.seed, **options})
    if 0 < n_sources < k:
        slopes = rank_adapters(case.bed.decoder, case.adapters, case.texts, {})
        positions = sorted(int(i) for i in np.argsort(slopes, kind="stable")[:n_sources])
        n_ranking = 3 * count_tokens(case.texts)
    state = bench.state(chosen.n_passes, "descent", scale, n_sources, replace(chosen, n_passes=0))
    found = descend(
        case.bed.decoder,
        [case.adapters[i] for i in positions],
        case.texts,
        np.full(len(positions), scale / len(positions)),
        chosen,
        passes=PASSES,
        checkpoint=state,
    )
    return found, positions, n_ranking


def _merged(
    bench: Bench, positions: list[int], found: Descended, rank: int | str, n_ranking: int
) -> Made:
    """The file of a combination, and how much of it the cut to a rank kept."""
    path = bench.path(f"gradient-{found.n_passes}-{rank}.gguf")
    files = [bench.case.adapters[i] for i in positions]
    method = {"method": "cat"} if rank == "cat" else {"method": "svd", "rank": rank}
    coefficients = {name: [float(c) for c in row] for name, row in found.coefficients.items()}
    if not any(any(row) for row in coefficients.values()):
        return Made([], found.n_tokens + n_ranking, {"passes": 0})
    report = merge_adapters(files, coefficients, path, force=True, **method)
    facts = {
        "passes": found.n_passes,
        "support_losses": _rounded(found.support_losses),
        "held_out_losses": _rounded(found.held_out_losses),
        "rank": report.max_rank,
        "energy": round(report.energy, 4),
        "size_bytes": path.stat().st_size,
    }
    return Made([WeightedAdapter(path)], found.n_tokens + n_ranking, facts)


def _trained(
    bench: Bench,
    pairs: Mapping[str, LoraPair],
    name: str,
    options: Mapping[str, Any],
    n_tokens: int,
) -> Made:
    chosen = PolishOptions(**{"seed": bench.case.seed, **options})
    state = bench.state(chosen.n_passes, name, replace(chosen, n_passes=0))
    decoder, texts = bench.case.bed.decoder, bench.case.texts
    found = polish(decoder, pairs, texts, chosen, passes=PASSES, checkpoint=state)
    path = bench.path(f"{name}-{chosen.n_passes}.gguf")
    plan = [
        PairPlan(p.name, p.rank, p.lora_a.shape[1], p.lora_b.shape[0]) for p in found.pairs.values()
    ]
    architecture = bench.case.bed.model.base.architecture
    write_lora(path, plan, found.pairs.values(), architecture=architecture, alpha=None)
    facts = {
        "passes": found.n_passes,
        "support_losses": _rounded(found.support_losses),
        "rank": max(p.rank for p in plan),
        "size_bytes": path.stat().st_size,
    }
    return Made([WeightedAdapter(path)], n_tokens + found.n_tokens, facts)


def _of_trial(trial: Trial, n_tokens: int) -> Made:
    candidate = trial.candidate
    facts = {"chosen": candidate.name, "scale": round(candidate.scale, 4)}
    return Made(trial.weighted(), n_tokens, facts)


def _modules(case: Case) -> list[str]:
    """The parts of a block that the bank's adapters update."""
    names = {name for file in case.adapters for name in file.plan}
    return sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(value, 5) for value in values]


def parse_arm(name: str) -> Arm:
    """An arm by the name that its lines of results carry: a head, and settings after it.

    Heads: base, own, mean, forward; gradient-N and few-N for N passes on coefficients, or on a LoRA
    from scratch; gradient-cv, stopped by cross-validation; polish-N, N passes on coefficients and
    then n_passes on the factors (as many as are left of 10). Settings are key=value: for gradient
    scale, n_sources and rank (see make_gradient) and the fields of DescentOptions; for few and
    polish rank and those of PolishOptions.

    Raises:
        ValueError: an unknown head or setting.

    Example:
        >>> parse_arm("gradient-3 step=0.1 weights=layer rank=cat").keywords["step"]
        0.1
    """
    head, *words = name.split()
    settings = {key: _value(text) for key, _, text in (word.partition("=") for word in words)}
    kind, _, n = head.partition("-")
    if head in _PLAIN and not settings:
        return _PLAIN[head]
    if kind not in _TAKES or not (n.isdecimal() or head == "gradient-cv"):
        raise ValueError(f"no arm {name!r}: {', '.join(_PLAIN)}, gradient-N, gradient-cv, few-N, "
                         "polish-N, with settings after all but the first four")  # fmt: skip
    if unknown := settings.keys() - _TAKES[kind]:
        raise ValueError(f"{name!r}: no setting {', '.join(sorted(unknown))}")
    if kind == "polish":
        left = {"n_passes": 10 - int(n)}
        return partial(make_polished, n_first=int(n), **left | settings)
    if kind == "few":
        return partial(make_few, n_passes=int(n), **settings)
    passes = {} if head == "gradient-cv" else {"n_passes": int(n), "n_folds": 0}
    return partial(make_gradient, **passes, **settings)


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _fields(record: type) -> set[str]:
    return {f.name for f in fields(record)}


_PLAIN: dict[str, Arm] = {
    "base": make_base,
    "own": make_own,
    "mean": make_mean,
    "forward": make_forward,
}
_TAKES = {
    "gradient": {"scale", "n_sources", "rank"} | _fields(DescentOptions),
    "few": {"rank"} | _fields(PolishOptions),
    "polish": {"rank"} | _fields(PolishOptions),
}
DEFAULT_ARMS = [
    *_PLAIN,
    *("gradient-1", "gradient-3", "gradient-10", "gradient-cv", "few-1", "few-3", "few-10"),
]
