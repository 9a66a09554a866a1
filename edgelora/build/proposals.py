"""Coefficients worth trying: from distances, from measured losses, from the surrogate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.build.alone import Measured
from edgelora.build.grams import open_mixture
from edgelora.build.pool import Pool
from edgelora.build.records import Options
from edgelora.datasets.records import Example
from edgelora.embedding_cache import open_cache
from edgelora.engine.context import Context
from edgelora.engine.score import TokenisedExample, count_tokens
from edgelora.errors import EdgeLoRAError
from edgelora.operators import surrogate
from edgelora.operators.distances import prepare
from edgelora.operators.heads import OPERATORS, attentional, gibbs, neural
from edgelora.operators.mixture import REGULARISATION
from edgelora.operators.neural import FILE_NAME, load_heads
from edgelora.signature import Signature
from edgelora.summarise import DEFAULT_N_EMBEDDED, summarise_examples

Array = NDArray[np.float64]
Proposal = tuple[str, Array]

PENALTIES = (5.0, 1.0)
NONE = "none"
LOSS_TEMPERATURE = 1.0
ACTIVATED = ("logo", "arrow")  # by what adapters do to activations: edgelora.build.activated
# The searches of `build.forward`, each with the operator whose candidates it goes on from.
WARM_STARTS = {"relinearised": "surrogate", "halving": NONE, "coordinate": "surrogate",
               "cma": "surrogate"}  # fmt: skip
OPERATOR_NAMES = ("auto", NONE, "mixture", "surrogate", *WARM_STARTS, *OPERATORS, *ACTIVATED)
MIN_SHOWN = 6
# Candidates of "auto" that are one adapter each (nearest, least loss), and those that are sums
# with weights from losses.
N_SINGLE, N_FITTED = 2, 1 + len(PENALTIES)


@dataclass(frozen=True, eq=False)
class Nearness:
    """How far a dataset is from those of the adapters.

    Attributes:
        distance: the name of the distance.
        target: the signature of the user's support examples.
        distances: (k,), inf for an adapter without a signature.
    """

    distance: str
    target: Signature
    distances: Array


def find_nearness(
    context: Context,
    pool: Pool,
    examples: Sequence[Example],
    distance: str,
    seed: int,
    *,
    n_embedded: int = DEFAULT_N_EMBEDDED,
    progress: Callable[[int], None] = lambda n_texts: None,
) -> Nearness | None:
    """Embed `examples` and measure; None if no adapter has a signature.

    Args:
        context: opened with `hidden=True`.
        n_embedded, progress: see summarise.summarise_examples.
    """
    if not pool.signed:
        return None
    distances_from = prepare(distance, pool.others, seed=seed)
    with open_cache() as cache:
        target = summarise_examples(
            context,
            examples,
            cache=cache,
            n_embedded=n_embedded,
            n_layers=pool.n_layers,
            seed=seed,
            progress=progress,
        )
    return _nearness(pool, target, distance, distances_from(target))


def compare(pool: Pool, target: Signature, distance: str, seed: int) -> Nearness:
    """The distances of a signature to those that the pool has, at least one."""
    return _nearness(pool, target, distance, prepare(distance, pool.others, seed=seed)(target))


def _nearness(pool: Pool, target: Signature, distance: str, measured: Array) -> Nearness:
    distances = pool.spread(pool.signed, measured)
    distances[pool.unsigned] = np.inf
    return Nearness(distance, target, distances)


def shortlist(
    pool: Pool, support: Sequence[TokenisedExample], nearness: Nearness | None, n_tokens: int
) -> tuple[list[int], list[TokenisedExample]]:
    """Which adapters to measure, on which examples, so that both fit `n_tokens`.

    All adapters on all examples if that fits; else no more adapters than the bank's calibration
    found to be enough, on the shortest examples, at least 6; else only the nearest adapters.
    """
    shown = sorted(support, key=lambda example: example.n_tokens)
    k = len(pool.records)
    if pool.calibration and nearness and (k + 1) * count_tokens(shown) > n_tokens:
        k = min(k, pool.calibration.shortlists.get(nearness.distance, k))
    while len(shown) > MIN_SHOWN and (k + 1) * count_tokens(shown) > n_tokens:
        shown.pop()
    n_measured = min(k, max(1, n_tokens // max(1, count_tokens(shown)) - 1))
    everything = np.arange(len(pool.records))
    order = np.argsort(nearness.distances, kind="stable") if nearness else everything
    return sorted(int(i) for i in order[:n_measured]), shown


def propose(
    pool: Pool, nearness: Nearness | None, measured: Measured | None, operator: str
) -> list[Proposal]:
    """The candidates' coefficients, simplest first; with a named operator only that one.

    Those by activations are made elsewhere.

    Raises:
        EdgeLoRAError: the operator needs signatures, or measured losses, and there are none.
    """
    names = _expand(operator, nearness is not None, measured is not None)
    return [
        p for name in names if name not in ACTIVATED for p in _named(name, pool, nearness, measured)
    ]


def count_candidates(options: Options, has_nearness: bool) -> int:
    """How many candidates a build compares where losses can be measured, at least.

    One more may come of the surrogate linearised again, which leaves tokens for its comparison.
    """
    names = _expand(options.operator, has_nearness, needs_losses(options))
    n_proposals = sum(len(PENALTIES) if name == "surrogate" else 1 for name in names)
    return n_proposals + (options.refine == "gradient") + (options.polish > 0)


def warm_start(operator: str) -> str:
    """The operator whose candidates are tried first: of most operators its own."""
    return WARM_STARTS.get(operator, operator)


def _expand(operator: str, has_nearness: bool, is_measured: bool) -> list[str]:
    """The operators that an operator's name stands for: several for auto."""
    if operator != "auto":
        return [] if operator == NONE else [operator]
    names = ["uniform"]
    names += ["nearest", "mixture"] if has_nearness else []
    return names + (["least loss", "gibbs", "surrogate"] if is_measured else [])


def needs_losses(options: Options) -> bool:
    """Whether the losses of single adapters are used; else none needs to be measured."""
    if options.operator == "auto":
        return options.refine == "forward"
    return warm_start(options.operator) in ON_LOSSES


def _named(
    operator: str, pool: Pool, nearness: Nearness | None, measured: Measured | None
) -> list[Proposal]:
    k = len(pool.records)
    if operator == "uniform":
        return [("uniform mean", np.full(k, 1.0 / k))]
    if operator in ON_LOSSES or operator in WARM_STARTS:
        if measured is None:
            raise EdgeLoRAError(
                f"the operator {operator} needs completions, and the dataset has none",
                hint="Choose an operator on distances, such as --operator mixture.",
            )
        return ON_LOSSES[operator](pool, measured)
    if nearness is None:
        raise EdgeLoRAError(
            f"the operator {operator} needs signatures, and no adapter of the bank has one",
            hint="Add the datasets with `edgelora bank add --data`, or choose --operator "
            f"{'gibbs' if measured else 'logo, arrow or uniform'}.",
        )
    if operator in CALIBRATED:
        return [(operator, pool.with_priors(CALIBRATED[operator](pool, nearness)))]
    if operator == "neural":
        return [(operator, _neural(pool, nearness))]
    return [(operator, OPERATORS[operator](nearness.distances))]


def _mixture(pool: Pool, nearness: Nearness) -> Array:
    fit = pool.calibration.mixture if pool.calibration else None
    strength = fit.temperature if fit else REGULARISATION
    found = open_mixture(pool.others).match(nearness.target, strength=strength)
    return pool.spread(pool.signed, found.coefficients)


def _attentional(pool: Pool, nearness: Nearness) -> Array:
    fits = pool.calibration.distances if pool.calibration else {}
    fit = fits.get(nearness.distance)
    return attentional(nearness.distances, temperature=fit.temperature if fit else None)


def _neural(pool: Pool, nearness: Nearness) -> Array:
    """The bank's trained head, for the distance in use."""
    path = pool.folder / FILE_NAME
    heads = load_heads(path.read_bytes(), str(path)) if path.is_file() else {}
    if nearness.distance not in heads:
        raise EdgeLoRAError(
            f"{path}: no neural head for the distance {nearness.distance}",
            hint="Train one with scripts/train_neural.py, or choose another --operator.",
        )
    return neural(nearness.distances, head=heads[nearness.distance])


def _least_loss(pool: Pool, measured: Measured) -> list[Proposal]:
    best = int(measured.losses.argmin())
    return [("least loss", pool.spread([measured.positions[best]], np.ones(1)))]


def _loss_weighted(pool: Pool, measured: Measured) -> list[Proposal]:
    return [("loss-weighted", pool.with_priors(_gibbs(pool, measured)))]


def _gibbs(pool: Pool, measured: Measured) -> Array:
    fit = pool.calibration.gibbs if pool.calibration else None
    weights = gibbs(measured.losses, temperature=fit.temperature if fit else LOSS_TEMPERATURE)
    return pool.spread(measured.positions, weights)


def _surrogates(pool: Pool, measured: Measured) -> list[Proposal]:
    start = gibbs(measured.losses, temperature=LOSS_TEMPERATURE)
    found = []
    for penalty in PENALTIES:
        fitted = surrogate.fit_step(
            measured.base.hidden,
            measured.slopes,
            measured.base.targets,
            measured.head,
            start=start,
            penalty=penalty,
            seen=measured.seen,
        )
        found.append((f"surrogate, penalty {penalty:g}", pool.spread(measured.positions, fitted)))
    return found


CALIBRATED = {"mixture": _mixture, "attentional": _attentional}
ON_LOSSES = {"least loss": _least_loss, "gibbs": _loss_weighted, "surrogate": _surrogates}
