"""Many interleaved requests over several adapter sets: does each get the answer of its own set?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.engine.quantize import quantize
from serve_benchmark import servers
from serve_benchmark.clients import Answer, Ask, ask_all
from serve_benchmark.facts import Model, Row, Run, say, target
from serve_benchmark.prompts import Prompt

N_CLIENTS, N_TOKENS, TOLERANCE = 8, 16, 1e-3
N_PREFIX, N_PROMPT = 32, 64
SCRIPTS = Path(__file__).resolve().parent.parent
Weights = tuple[tuple[Path, float], ...]
Alone = dict[str, list[Any]]


@dataclass(frozen=True)
class Verdict:
    """One answer beside that of a process of its own.

    Attributes:
        worst: largest difference of a log-probability before the texts part.
        lead: how far the best token led where they part; None where they do not.
    """

    worst: float
    lead: float | None

    @property
    def equal(self) -> bool:
        """By the definition: 1e-3, and the same text unless two tokens were that close."""
        return self.worst <= TOLERANCE and (self.lead is None or self.lead <= TOLERANCE)


def run(run: Run) -> Iterator[Row]:
    """SmolLM2 with F32 weights and KV, where 1e-3 tells a leak from rounding; then as it ships."""
    small = run.models[0]
    exact = run.folder / "smollm2-f32.gguf"
    if not exact.is_file():
        quantize(small.path, exact, "f32")
    twin = Model("SmolLM2-135M F32, KV f32", exact, small.sources, small.combined, small.rank)
    yield _model(run, twin, "f32")
    yield _model(run, small, "f16")


def adapter_sets(model: Model) -> list[Weights]:
    """The base, one adapter, another, and two at once."""
    first, second = model.sources[:2]
    return [(), ((first, 1.0),), ((second, 1.0),), ((first, 0.7), (second, 0.5))]


def _model(run: Run, model: Model, kv_type: str) -> Row:
    n_requests, n_prompts = (32, 2) if run.quick else (500, 10)
    sets = adapter_sets(model)
    prompts = _prompts(run, model, n_prompts)
    alone = {
        (i, j): _alone(run, model, prompt, weights, kv_type)
        for i, prompt in enumerate(prompts)
        for j, weights in enumerate(sets)
    }
    say(f"  {model.name}: {len(alone)} answers computed, each in a process of its own")
    order = np.random.default_rng(5).permutation(
        [list(alone)[n % len(alone)] for n in range(n_requests)]
    )
    asks = [
        Ask(prompts[i], N_TOKENS, logprobs=1, cached=True,
            adapters=tuple((path.stem, weight) for path, weight in sets[j]))
        for i, j in order
    ]  # fmt: skip
    setting = run.setting(model, n_slots=N_CLIENTS, n_ctx=256)
    options = ["--kv-type", kv_type]
    with servers.edgelora(setting, model.sources[:2], options=options) as ours:
        answers = ask_all(ours.port, ours.protocol, asks, N_CLIENTS)
    verdicts = [compare(answer, alone[i, j]) for answer, (i, j) in zip(answers, order, strict=True)]
    return _row(model, kv_type, verdicts, _apart(alone, len(prompts), len(sets)))


def _prompts(run: Run, model: Model, count: int) -> list[Prompt]:
    """Half of them begin alike: a prefix that is shared, and must not be across adapter sets."""
    half = count // 2
    with run.maker(model, seed=6) as maker:
        (shared,) = maker.prompts(1, N_PREFIX)
        alike = maker.prompts(half, N_PROMPT, after=shared)
        return alike + maker.prompts(count - half, N_PROMPT)


def _alone(run: Run, model: Model, prompt: Prompt, weights: Weights, kv_type: str) -> Alone:
    question = {
        "base": str(model.path), "adapters": [(str(p), w) for p, w in weights],
        "prompt": prompt.ids, "n_tokens": N_TOKENS, "kv_type": kv_type, "n_threads": run.n_threads,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "serve_benchmark.alone"],
        input=json.dumps(question), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the answer alone failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def compare(answer: Answer, alone: Alone) -> Verdict:
    """An answer of the server beside the one computed alone, up to where their texts part."""
    told = answer.body["choices"][0]["logprobs"]
    worst = 0.0
    for i, (text, logprob) in enumerate(zip(told["tokens"], told["token_logprobs"], strict=True)):
        if text != alone["texts"][i]:
            return Verdict(worst, alone["leads"][i])
        worst = max(worst, abs(logprob - alone["logprobs"][i]))
    return Verdict(worst, None)


def _apart(alone: dict[tuple[int, int], Alone], n_prompts: int, n_sets: int) -> float:
    """How far the sets' own first tokens lie apart: the median of what a leak would show."""
    first = [[alone[i, j]["logprobs"][0] for j in range(n_sets)] for i in range(n_prompts)]
    differences: Sequence[float] = [
        abs(row[a] - row[b]) for row in first for a in range(n_sets) for b in range(a)
    ]
    return float(np.median(differences))


def _row(model: Model, kv_type: str, verdicts: list[Verdict], apart: float) -> Row:
    parted = [verdict.lead for verdict in verdicts if verdict.lead is not None]
    worst = [verdict.worst for verdict in verdicts]
    equal = sum(verdict.equal for verdict in verdicts)
    row: Row = {"part": "isolation", "model": model.name, "kv_type": kv_type}
    row |= {
        "n_requests": len(verdicts), "equal": equal, "other_text": len(parted),
        "ties": sum(lead <= TOLERANCE for lead in parted), "largest_lead": max(parted, default=0.0),
        "worst": max(worst), "median": float(np.median(worst)), "sets_apart": apart,
    }  # fmt: skip
    bound = 1.0 if kv_type == "f32" else None
    return row | {"targets": [target("answers equal, of all", equal / len(verdicts), least=bound)]}
