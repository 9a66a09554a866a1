"""`edgelora eval`: the base and adapters side by side on a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelora.cli import console
from edgelora.cli.options import (
    check_templates,
    data_options,
    json_option,
    load_dataset,
    model_options,
    open_engine,
    show_template_warnings,
)

if TYPE_CHECKING:
    from edgelora.datasets.records import Example
    from edgelora.datasets.template import Template
    from edgelora.engine.model import Model
    from edgelora.evaluate import Arm, Evaluation

_USUAL_CONTEXT = 4096


@click.command()
@model_options
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="A GGUF LoRA; repeatable.",
)
@data_options
@click.option("--limit", type=click.IntRange(min=1), help="Take the first N examples.")
@click.option("--no-generate", is_flag=True, help="Loss only: no answers, far quicker.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=48,
    show_default=True,
    help="Of each answer; longer ones are cut there.",
)
@json_option
@console.common_options
@console.tells_memory
def command(
    base: str,
    adapters: tuple[Path, ...],
    data: Path,
    prompt_key: str | None,
    completion_key: str | None,
    limit: int | None,
    template: str | None,
    low_ram: bool | None,
    no_generate: bool,
    max_tokens: int,
    as_json: bool,
    threads: int,
    seed: int,
) -> None:
    """Compare the base and adapters on a dataset: loss, ROUGE-L, exact match.

    The interval is that of the paired bootstrap (95 %) of the adapter's loss less the base's, in
    nats for each completion token: below zero the adapter is better.
    """
    if not no_generate:
        _require_rouge()
    dataset = load_dataset(data, prompt_key, completion_key, limit)
    with open_engine(base, threads, low_ram) as model:
        max_answer = 0 if no_generate else max_tokens
        found = _evaluate(model, template, dataset.examples, adapters, str(data), max_answer, seed)
    if as_json:
        console.show_json(found.as_json())
    else:
        _show(found)


def _require_rouge() -> None:
    """Raise EdgeLoRAError (with the extra's name) before any work if rouge-score is missing."""
    from edgelora.metrics import rouge_l

    rouge_l("probe", ["probe"])


def _evaluate(
    model: Model,
    template: str | None,
    examples: Sequence[Example],
    adapters: Sequence[Path],
    data: str,
    max_answer: int,
    seed: int,
) -> Evaluation:
    from edgelora.engine.context import open_context
    from edgelora.engine.prepare import model_template
    from edgelora.evaluate import evaluate

    used = model_template(model, template)
    for path in adapters:  # all are checked and loaded before the long part
        model.adapter(path)
    check_templates(used.key, adapters)
    n_ctx = _context_size(model, used, examples, max_answer)
    total = (1 + len(adapters)) * sum(example.completion is not None for example in examples)
    with (
        open_context(model, n_ctx=n_ctx, n_batch=512) as context,
        console.progress("evaluating", total) as advance,
    ):
        found = evaluate(
            context, used, examples, adapters, data=data, generate=max_answer > 0,
            max_answer=max_answer, seed=seed, progress=advance,
        )  # fmt: skip
    show_template_warnings(used, set())
    return found


def _context_size(
    model: Model, template: Template, examples: Sequence[Example], max_answer: int
) -> int:
    """Room for the longest example, and for several at once where they are short."""
    from edgelora.engine.prepare import tokenise_examples

    sizes = [
        len(example.prompt) + max(len(example.completion), max_answer)
        for example in tokenise_examples(model, template, examples)
    ]
    return max(256, *sizes, min(_USUAL_CONTEXT, sum(sizes)))


def _show(found: Evaluation) -> None:
    rows = [("arm", "loss", "tokens", "ROUGE-L", "exact", "loss vs base (95 %)")]
    rows += [_cells(arm) for arm in found.arms]
    console.show_columns(rows, right=(1, 2, 3, 4))
    console.say(
        f"{found.examples} examples; loss in nats for each completion token, end token included"
    )


def _cells(arm: Arm) -> tuple[str, str, str, str, str, str]:
    rouge, exact = ("" if x is None else f"{x:.3f}" for x in (arm.rouge_l, arm.exact_match))
    interval = ""
    if arm.loss_vs_base is not None:
        low, mid, high = arm.loss_vs_base
        said = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
        interval = f"{mid:+.4f} [{low:+.4f}, {high:+.4f}] {said}"
    return arm.name, f"{arm.loss:.4f}", str(arm.n_tokens), rouge, exact, interval
