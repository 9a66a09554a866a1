"""What is compared: each arm makes an adapter file from a case, or says which one there is."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import PairPlan, open_lora, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.adapters.merge import merge_adapters
from edgelora.build.forward import begin_search, find_trials
from edgelora.build.proposals import NONE, OPERATOR_NAMES
from edgelora.build.trials import Budget, Trial, least_loss, make_trial, try_scales
from edgelora.engine.context import Context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import count_tokens
from edgelora.gradient.checkpoint import fingerprint, from_bytes
from edgelora.gradient.decoder import Decoder, PassOptions
from edgelora.gradient.descent import Descended, DescentOptions, descend, rank_adapters
from edgelora.gradient.observers import CoefficientGradients
from edgelora.gradient.polish import PolishOptions, fresh_pairs, polish
from edgelora.gradient.updates import Combined
from gradient_quality.bed import Case

UNLIMITED = 10**12
# As `build` has it where memory allows.
PASSES = PassOptions(keep_bytes=1 << 30, stack_bytes=256 << 20)


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

    def trials(self) -> Path:
        """A new folder for trials, whose names say what they are and not for which arm."""
        return Path(tempfile.mkdtemp(dir=self.folder))

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
    trial = make_trial("uniform mean", np.full(k, 1 / k), bench.case.pool.paths, bench.trials())
    budget = Budget(UNLIMITED)
    trial = try_scales(bench.context, trial, bench.case.texts, budget)
    return _of_trial(trial, budget.n_used)


def make_forward(
    bench: Bench, *, n: int = 1, operator: str = "auto", budget: int = UNLIMITED
) -> Made:
    """What `build` finds by forward passes; the least loss on the support examples wins.

    Args:
        n: linearisations of the surrogate, at most; 1 is the one at the base.
        operator: "auto" for all candidates, or a name of `build`'s.
        budget: tokens that it may compute, embedding aside.
    """
    return _of_trial(*_best_forward(bench, n, operator, budget))


def _best_forward(bench: Bench, n: int, operator: str, n_tokens: int) -> tuple[Trial, int]:
    """That candidate, and the tokens that it took to find it."""
    case, budget = bench.case, Budget(n_tokens)
    bench.context.apply([])
    search = begin_search(
        case.bed.model, case.pool, case.support, case.texts, operator, bench.trials(), budget,
        n_linearisations=n, seed=case.seed,
    )  # fmt: skip
    trials: list[Trial] = []
    find_trials(search, operator, trials)
    return least_loss(trials), budget.n_used


def make_gradient(
    bench: Bench,
    *,
    start: str = "mean",
    scale: float = 1.0,
    n_sources: int = 0,
    ranked_at: str = "base",
    rank: int | str = "auto",
    products: str = "fastest",
    **options: Any,
) -> Made:
    """Coefficients by gradient descent from the uniform mean times `scale`.

    Args:
        start: "mean", or "forward" for what the arm of that name finds.
        n_sources: only so many adapters, those of the steepest slope; 0 for all.
        ranked_at: where the slope is taken: "base" or "mean".
        rank: of the file; "cat" for the exact combination.
        products: "float32", or the fastest for each type of weights, as `build` has them.
        options: see DescentOptions.
    """
    decoder = bench.case.bed.exact if products == "float32" else bench.case.bed.decoder
    begin = _begin(bench, decoder, start, scale, n_sources, ranked_at)
    return _merged(bench, begin, _descended(bench, begin, options), rank)


def make_few(bench: Bench, *, rank: int = 16, **options: Any) -> Made:
    """A LoRA from scratch on the support examples, of the tensors that the bank adapts."""
    base = bench.case.bed.decoder.base
    pairs = fresh_pairs(base, rank, _modules(bench.case), seed=bench.case.seed)
    return _trained(bench, pairs, f"few-r{rank}", options, 0)


def make_polished(bench: Bench, *, n_first: int, rank: int | str = "auto", **options: Any) -> Made:
    """`n_first` passes on coefficients, the file cut to its rank, then passes on its factors."""
    begin = _begin(bench, bench.case.bed.decoder, "mean", 1.0, 0, "base")
    found = _descended(bench, begin, {"n_passes": n_first, "n_folds": 0})
    made = _merged(bench, begin, found, rank)
    pairs = {pair.name: pair for pair in open_lora(made.adapters[0].path).pairs()}
    return _trained(bench, pairs, f"polish-{n_first}-{rank}", options, made.n_tokens)


@dataclass(frozen=True, eq=False)
class _Begin:
    """What a descent runs on, its adapters and start, and the tokens that it took to find these."""

    decoder: Decoder
    positions: list[int]
    start: NDArray[np.float64]
    n_tokens: int
    name: tuple[object, ...]


def _begin(
    bench: Bench, decoder: Decoder, start: str, scale: float, n_sources: int, ranked_at: str
) -> _Begin:
    """Where a descent begins; see make_gradient."""
    case, n_tokens = bench.case, 0
    k = len(case.adapters)
    if start == "forward":
        best, n_tokens = _best_forward(bench, 1, "auto", UNLIMITED)
        coefficients = best.candidate.coefficients * best.candidate.scale
    else:
        coefficients = np.full(k, 1 / k)
    positions = list(range(k))
    if 0 < n_sources < k:
        names = CoefficientGradients(case.adapters).names
        row = [1 / k if ranked_at == "mean" else 0.0] * k
        at = Combined(case.adapters, dict.fromkeys(names, row))
        slopes = rank_adapters(decoder, case.adapters, case.texts, at)
        positions = sorted(int(i) for i in np.argsort(slopes, kind="stable")[:n_sources])
        n_tokens += 3 * count_tokens(case.texts)
        if start == "mean":
            coefficients *= k / n_sources
    name = (start, scale, n_sources, ranked_at, decoder is bench.case.bed.exact)
    return _Begin(decoder, positions, scale * coefficients[positions], n_tokens, name)


def _descended(bench: Bench, begin: _Begin, options: Mapping[str, Any]) -> Descended:
    case = bench.case
    chosen = DescentOptions(**{"seed": case.seed, **options})
    return descend(
        begin.decoder,
        [case.adapters[i] for i in begin.positions],
        case.texts,
        begin.start,
        chosen,
        passes=PASSES,
        checkpoint=bench.state(
            chosen.n_passes, "descent", *begin.name, replace(chosen, n_passes=0)
        ),
    )


def _merged(bench: Bench, begin: _Begin, found: Descended, rank: int | str) -> Made:
    """The file of a combination, and how much of it the cut to a rank kept."""
    path = bench.path(f"gradient-{found.n_passes}-{rank}.gguf")
    files = [bench.case.adapters[i] for i in begin.positions]
    method = {"method": "cat"} if rank == "cat" else {"method": "svd", "rank": rank}
    if not any(row.any() for row in found.coefficients.values()):
        return Made([], found.n_tokens + begin.n_tokens, {"passes": 0})
    report = merge_adapters(files, found.coefficients, path, force=True, **method)
    facts = {
        "passes": found.n_passes,
        "support_losses": _rounded(found.support_losses),
        "held_out_losses": _rounded(found.held_out_losses),
        "rank": report.max_rank,
        "energy": round(report.energy, 4),
        "size_bytes": path.stat().st_size,
    }
    return Made([WeightedAdapter(path)], found.n_tokens + begin.n_tokens, facts)


def _trained(
    bench: Bench,
    pairs: Mapping[str, LoraPair],
    name: str,
    options: Mapping[str, Any],
    n_tokens: int,
) -> Made:
    chosen = PolishOptions(**{"seed": bench.case.seed, **options})
    begin = [factor for p in pairs.values() for factor in (p.lora_a, p.lora_b)]
    state = bench.state(chosen.n_passes, name, replace(chosen, n_passes=0), *begin)
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

    Heads: base, own, mean, forward; forward-N for N linearisations of the surrogate, the one at the
    base (which is forward) among them; gradient-N and few-N for N passes on coefficients, or on a
    LoRA from scratch; gradient-cv, stopped by cross-validation; polish-N, N passes on coefficients
    and then n_passes on the factors (as many as are left of 10). Settings are key=value: for
    forward operator and budget (see make_forward); for gradient start, scale, n_sources, ranked_at
    and rank (see make_gradient) and the fields of DescentOptions; for few and polish rank and those
    of PolishOptions.

    Raises:
        ValueError: an unknown head or setting.

    Example:
        >>> parse_arm("gradient-3 step=0.1 weights=layer rank=cat").keywords["step"]
        0.1
    """
    head, *words = name.split()
    settings = {key: value_of(text) for key, _, text in (word.partition("=") for word in words)}
    kind, _, n = head.partition("-")
    if head in _PLAIN and not settings:
        return _PLAIN[head]
    if kind not in _TAKES or not (n.isdecimal() or head == "gradient-cv"):
        raise ValueError(f"no arm {name!r}: {', '.join(_PLAIN)}, forward-N, gradient-N, "
                         "gradient-cv, few-N, polish-N, with settings after all that have N or cv"
                         )  # fmt: skip
    if unknown := settings.keys() - _TAKES[kind]:
        raise ValueError(f"{name!r}: no setting {', '.join(sorted(unknown))}")
    for key, known in _WORDS.items():
        if settings.get(key, known[0]) not in known:
            raise ValueError(f"{name!r}: no setting {key}={settings[key]}")
    if kind == "forward":
        return partial(make_forward, n=int(n), **settings)
    if kind == "polish":
        left = {"n_passes": 10 - int(n)}
        return partial(make_polished, n_first=int(n), **left | settings)
    if kind == "few":
        return partial(make_few, n_passes=int(n), **settings)
    passes = {} if head == "gradient-cv" else {"n_passes": int(n), "n_folds": 0}
    return partial(make_gradient, **passes, **settings)


def value_of(text: str) -> int | float | str:
    """A setting as it stands in the name of an arm: a number where it is one."""
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
    "forward": {"operator", "budget"},
    "gradient": {"start", "scale", "n_sources", "ranked_at", "rank"} | _fields(DescentOptions),
    "few": {"rank"} | _fields(PolishOptions),
    "polish": {"rank"} | _fields(PolishOptions),
}
_WORDS = {
    "start": ("mean", "forward"),
    "ranked_at": ("base", "mean"),
    "operator": tuple(name for name in OPERATOR_NAMES if name != NONE),
}
DEFAULT_ARMS = [
    *_PLAIN,
    *("gradient-1", "gradient-3", "gradient-10", "gradient-cv", "few-1", "few-3", "few-10"),
]
