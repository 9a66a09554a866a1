"""One case, arm by arm: made, judged by llama.cpp on the test lines, kept as a line of results."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gradient_quality.bed import Case
from result_lines import Row

from edgelora.adapters.gguf_lora import open_lora
from edgelora.engine.context import Context, open_context
from edgelora.evaluate import references
from edgelora.leave_one_out.judging import Judged, context_size, judge
from edgelora.metrics import paired_bootstrap
from operators_benchmark.bench import Bench, Made
from operators_benchmark.costs import Bill
from operators_benchmark.paper_protocol import answer_measures, weight_errors
from operators_benchmark.registry import Arm
from operators_benchmark.results import Key

N_COEFFICIENTS = 12  # the largest, which a line of results names


@dataclass(frozen=True)
class Wanted:
    """What is measured of each arm.

    Attributes:
        answers: greedy answers, for exact match and ROUGE-L.
        paper: the paper's own measures too.
        n_prompt: tokens that a prompt with examples before it may have.
    """

    answers: bool = False
    paper: bool = False
    n_prompt: int = 768


def key_for(arm: Arm, bed: str, split: str, task: str, seed: int, n_labels: int) -> Key:
    """The key of an arm's line."""
    return (bed, arm.split(split), task, arm.name, seed, arm.labels(n_labels))


def measure_case(
    case: Case,
    arms: Sequence[Arm],
    done: dict[Key, Row],
    folder: Path,
    heads: Path,
    n_labels: int,
    wanted: Wanted,
) -> Iterator[Row]:
    """A line for each arm that `done` lacks, as it is finished; `done` is not changed.

    A line without answers is measured again where they are wanted.

    Args:
        arms: base and own first, as registry.expand has them.
        folder: of this case only; kept, it lets a descent go on where it was stopped.
    """
    missing = [arm for arm in arms if not _has_all(done.get(_key(arm, case, n_labels)), wanted)]
    if not missing:
        return
    base = None if arms[0] in missing else done[_key(arms[0], case, n_labels)]
    with open_context(case.bed.model, n_ctx=context_size(case.test_texts)) as context:
        bench = Bench(case, n_labels, context, folder, heads, wanted.n_prompt)
        for arm in missing:
            row = _measure(bench, arm, base, wanted)
            for path in folder.iterdir():
                shutil.rmtree(path, ignore_errors=True)
            base = base or row
            yield row


def _has_all(row: Row | None, wanted: Wanted) -> bool:
    if row is None or (wanted.paper and "paper" not in row):
        return False
    return not wanted.answers or row["exact"] is not None


def _measure(bench: Bench, arm: Arm, base: Row | None, wanted: Wanted) -> Row:
    goes_on = any(bench.folder.glob("*/*.state"))
    with bench.meter.billing() as bill:
        made = arm.make(bench)
    judged = _judge(bench, made, wanted)
    case = bench.case
    return {
        "bed": case.bed.name,
        "split": arm.split(case.split),
        "task": case.task,
        "arm": arm.name,
        "seed": case.seed,
        "labels": arm.labels(bench.n_labels),
        "source": sorted(case.bed.source(case.task)),
        "category": sorted(case.bed.origins[case.task].categories),
        "base": case.bed.model.base.path.name,
        "n_test": len(case.test),
        "loss": round(judged.loss, 5),
        **_answers(judged),
        **_beside(judged, base),
        **_costs(bill, goes_on),
        **({"paper": _paper(bench, made, judged)} if wanted.paper else {}),
        **made.facts,
        **_coefficients(bench, made),
    }


def _judge(bench: Bench, made: Made, wanted: Wanted) -> Judged:
    case, texts = bench.case, made.test or bench.case.test_texts

    def judged(context: Context) -> Judged:
        return judge(context, made.adapters, texts, case.test, with_answers=wanted.answers)

    if made.test is None:
        return judged(bench.context)
    with open_context(case.bed.model, n_ctx=context_size(texts)) as context:
        return judged(context)


def _answers(judged: Judged) -> Row:
    if not judged.answers:
        return {"exact": None, "rouge_l": None}
    return {"exact": round(float(np.mean(judged.exact)), 4),
            "rouge_l": round(float(np.mean(judged.rouge)), 4)}  # fmt: skip


def _beside(judged: Judged, base: Row | None) -> Row:
    """Paired differences to the base's line, 95 %: (low, mid, high). The base keeps its items."""
    nll = [s.nll for s in judged.scores]
    if base is None:
        return {
            "items": {
                "nll": [round(value, 4) for value in nll],
                "n_tokens": [s.n_tokens for s in judged.scores],
                "rouge_l": [round(value, 4) for value in judged.rouge],
            }
        }
    items = base["items"]
    gaps, n_tokens = np.array(nll) - np.array(items["nll"]), np.array(items["n_tokens"], float)
    found: Row = {"loss_vs_base": _interval(gaps, n_tokens)}
    if judged.rouge and items["rouge_l"]:
        rouge = np.array(judged.rouge) - np.array(items["rouge_l"])
        found["rouge_vs_base"] = _interval(rouge, np.ones(len(rouge)))
    return found


def _interval(differences: Any, weights: Any) -> list[float]:
    return [round(value, 4) for value in paired_bootstrap(differences, weights)]


def _costs(bill: Bill, goes_on: bool) -> Row:
    """Times are unknown where a descent went on from a state of an earlier run."""
    total = bill.total()
    times = {"cpu_s": round(total.cpu_s, 2), "wall_s": round(total.wall_s, 2)}
    return {"tokens": total.tokens} | (dict.fromkeys(times) if goes_on else times)


def _paper(bench: Bench, made: Made, judged: Judged) -> Row:
    case = bench.case
    own, shapes = open_lora(case.own), case.bed.model.base.shapes
    found: Row = dict(weight_errors(made.adapters, own, shapes))
    if judged.answers:
        found |= answer_measures(judged.answers, [references(line)[0] for line in case.test])
    return found


def _coefficients(bench: Bench, made: Made) -> Row:
    """The largest by name, and how many adapters they are spread over, exp(entropy of shares)."""
    if made.coefficients is None:
        return {}
    values = made.coefficients
    largest = [int(i) for i in np.argsort(-np.abs(values), kind="stable")[:N_COEFFICIENTS]]
    named = {bench.pool.names[i]: round(float(values[i]), 3) for i in largest if values[i]}
    total = np.abs(values).sum()
    shares = np.abs(values[values != 0]) / total if total else np.ones(1)
    spread = float(np.exp(-(shares * np.log(shares)).sum()))
    return {"coefficients": named, "spread": round(spread, 2)}


def _key(arm: Arm, case: Case, n_labels: int) -> Key:
    return key_for(arm, case.bed.name, case.split, case.task, case.seed, n_labels)
