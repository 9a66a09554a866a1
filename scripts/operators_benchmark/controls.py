"""What every operator has to beat, and what none can: baselines, controls, oracles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from gradient_quality import arms as gradient_arms
from gradient_quality.bed import make_case

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.build.alone import measure_alone, open_head
from edgelora.datasets.records import Example, Message
from edgelora.engine.context import open_context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.prepare import tokenise_examples
from edgelora.engine.score import TokenisedExample, count_tokens
from edgelora.operators.heads import nearest
from edgelora.operators.mixture import mixture
from edgelora.operators.surrogate import token_losses
from operators_benchmark.bench import UNCUT, Bench, Made


def make_base(bench: Bench) -> Made:
    """The base alone."""
    return Made([])


def make_own(bench: Bench) -> Made:
    """The task's own adapter."""
    return Made([WeightedAdapter(bench.case.own)])


def make_uniform(bench: Bench, *, combine: str = "exact", rank: int | str = "auto") -> Made:
    """The uniform mean as it is; nothing is asked of the dataset."""
    made = bench.combined(np.full(bench.k, 1 / bench.k), combine=combine, rank=rank)
    if combine != "linear":
        return made
    return replace(made, facts=made.facts | factor_cosines(bench.case.adapters))


def factor_cosines(files: Sequence[LoraFile]) -> dict[str, float]:
    """How alike the adapters' factors are: mean cosines of all A, and of all B, over pairs.

    Averaged factors are the exact mean of the updates where all A, or all B, are the same.
    """
    found = {}
    for key in ("lora_a", "lora_b"):
        gram = np.zeros((len(files), len(files)))
        for name in files[0].names:
            factors = (np.asarray(getattr(file.pair(name), key), np.float32) for file in files)
            flat = np.stack([factor.ravel() for factor in factors])
            gram += flat @ flat.T
        lengths = np.sqrt(np.diag(gram))
        cosines = gram / np.outer(lengths, lengths)
        found[f"cosine_{key[-1]}"] = round(float(cosines[np.triu_indices(len(files), 1)].mean()), 4)
    return found


def make_mean(bench: Bench) -> Made:
    """The uniform mean at the scale that is best on the support lines."""
    return bench.scaled("uniform mean", np.full(bench.k, 1 / bench.k))


def make_nearest(bench: Bench, *, distance: str = "bures") -> Made:
    """The adapter of the nearest dataset."""
    found = bench.nearness(distance)
    return bench.scaled("nearest", nearest(found.distances))


def make_random(bench: Bench, *, n: int = 8) -> Made:
    """The mean of `n` adapters drawn at random."""
    chosen = _drawn(bench, "random").sample(range(bench.k), min(n, bench.k))
    return bench.scaled("random", bench.pool.spread(chosen, np.full(len(chosen), 1 / len(chosen))))


def make_shuffled(bench: Bench) -> Made:
    """Mixture matching with the adapters' datasets dealt out anew: what distances know is lost."""
    pool = bench.pool
    others = _drawn(bench, "shuffled").sample(pool.others, len(pool.others))
    weights = mixture(bench.signature(), others)
    return bench.scaled("shuffled", pool.spread(pool.signed, weights))


def make_oracle(bench: Bench) -> Made:
    """The single adapter of least loss on the test lines themselves: no choice of one is better."""
    case, texts = bench.case, bench.case.test_texts
    bench.meter.spend(bench.k * count_tokens(texts))
    with open_context(case.bed.model, hidden=True) as context:
        head = open_head(case.bed.model)
        losses = [
            token_losses(states.hidden, states.targets, head).mean()
            for states in measure_alone(context, bench.pool.paths, texts, lambda done, total: None)
        ]
    best = int(np.argmin(losses))
    return Made([WeightedAdapter(bench.pool.paths[best])], {"chosen": bench.pool.names[best]},
                bench.pool.spread([best], np.ones(1)))  # fmt: skip


def make_ceiling(
    bench: Bench, *, weights: str = "adapter", n: int = 128, n_passes: int = 10
) -> Made:
    """Coefficients fitted by gradients on `n` training lines: what such coefficients could do."""
    case = bench.case
    wider = make_case(case.bed, case.task, n_labels=n, n_test=1, seed=case.seed, split=case.split)
    made = gradient_arms.make_gradient(
        bench.for_gradients("ceiling", wider), weights=weights, n_passes=n_passes, n_folds=0,
        rank=UNCUT,
    )  # fmt: skip
    bench.meter.spend(made.n_tokens)
    return Made(made.adapters, made.facts)


def make_in_context(bench: Bench) -> Made:
    """The support lines as turns before each test line, as many as fit the prompt's tokens."""
    case, found, shown = bench.case, [], []
    room = min(bench.n_prompt, case.bed.model.n_ctx_train)
    for line in case.test:
        text, n = _longest_prompt(bench, line, room)
        found.append(text)
        shown.append(n)
    facts = {
        "shown": round(float(np.mean(shown)), 1),
        "prompt_tokens": round(float(np.mean([len(text.prompt) for text in found])), 1),
    }
    return Made([], facts, test=found)


def _longest_prompt(bench: Bench, line: Example, room: int) -> tuple[TokenisedExample, int]:
    """A test line after as many support lines as fit, and how many; found by bisection."""
    low, high = 0, len(bench.case.support)
    best = _after(bench, line, 0)
    while low < high:
        middle = (low + high + 1) // 2
        text = _after(bench, line, middle)
        if text.n_tokens <= room:
            low, best = middle, text
        else:
            high = middle - 1
    return best, low


def _after(bench: Bench, line: Example, n: int) -> TokenisedExample:
    bed = bench.case.bed
    system, rest = _parted(line.messages)
    turns = [turn for shown in bench.case.support[:n] for turn in _as_turns(shown)]
    (text,) = tokenise_examples(
        bed.model, bed.template, [replace(line, messages=(*system, *turns, *rest))]
    )
    return text


def _as_turns(line: Example) -> Sequence[Message]:
    return (*_parted(line.messages)[1], Message("assistant", line.completion or ""))


def _parted(messages: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
    """The system turn, if there is one, and the others."""
    n = int(messages[0].role == "system")
    return messages[:n], messages[n:]


def _drawn(bench: Bench, what: str) -> random.Random:
    return random.Random(f"{bench.case.seed} {bench.case.task} {what}")
