"""`edgelora build`: one adapter for a dataset, combined from a bank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from edgelora.cli import console
from edgelora.cli.options import (
    combine_options,
    data_options,
    json_option,
    load_dataset,
    model_options,
    open_engine,
)

if TYPE_CHECKING:
    from edgelora.build import Built, Listener, Plan
    from edgelora.operators.arbiter import Verdict

_N_CHARTED = 15


@click.command()
@model_options
@click.option(
    "--bank", "bank_path", required=True, type=click.Path(path_type=Path), help="Folder of a bank."
)
@data_options
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The adapter to write."
)
@click.option("--budget", type=click.IntRange(min=1), help="Tokens that it may compute.")
@click.option("--operator", default="auto", help="auto: the arbiter chooses among all.")
@click.option("--distance", help="Between datasets (default: bures).")
@combine_options
@click.option("--exclude", multiple=True, help="Adapters to leave out, a pattern; repeatable.")
@click.option("--force", is_flag=True, help="Overwrite; write even if the base is better.")
@json_option
@console.common_options
def command(
    base: str,
    bank_path: Path,
    data: Path,
    prompt_key: str | None,
    completion_key: str | None,
    out: Path,
    template: str | None,
    low_ram: bool,
    as_json: bool,
    threads: int,
    **choices: Any,
) -> None:
    """Combine adapters of a bank into one for your dataset."""
    from edgelora.bank import open_bank
    from edgelora.build import build
    from edgelora.engine.prepare import model_template

    options = _options(**choices)
    bank = open_bank(bank_path)
    dataset = load_dataset(data, prompt_key, completion_key)
    with open_engine(base, threads, low_ram) as model, _listener() as listener:
        used = model_template(model, template)
        built = build(model, bank, dataset, used, out, options, listener)
    if as_json:
        console.show_json(_as_json(built))
    else:
        _show(built)


def _options(budget: int | None, distance: str | None, operator: str, **choices: Any) -> Any:
    from edgelora.build.proposals import OPERATOR_NAMES
    from edgelora.build.records import DEFAULT_BUDGET, DEFAULT_DISTANCE, Options
    from edgelora.operators.distances import DISTANCES

    distance = distance or DEFAULT_DISTANCE
    for name, value, known in (
        ("--operator", operator, OPERATOR_NAMES),
        ("--distance", distance, DISTANCES),
    ):
        if value not in known:
            raise click.BadParameter(f"{value}; one of {', '.join(known)}", param_hint=name)
    return Options(
        distance=distance, operator=operator, budget_tokens=budget or DEFAULT_BUDGET, **choices
    )


@contextlib.contextmanager
def _listener() -> Iterator[Listener]:
    """A bar for each stage on stderr, the plan above them, warnings as they come."""
    from edgelora.build import Listener

    with console.stages() as advance:
        yield Listener(
            plan=_show_plan,
            progress=advance,
            warn=lambda message: console.warn(console.safe(message)),
        )


def _show_plan(plan: Plan) -> None:
    if not plan.n_measured:
        console.say(
            f"plan: distances from {plan.n_support} examples to {plan.n_adapters} adapters; "
            f"{plan.n_tokens:,} tokens at most"
        )
        return
    console.say(
        f"plan: {plan.n_support} examples to find coefficients (support), {plan.n_selection} to "
        f"choose (selection), {plan.n_untouched or 'none'} untouched; {plan.n_measured} of "
        f"{plan.n_adapters} adapters measured on {plan.n_shown} examples"
    )
    console.say(
        f"      about {plan.n_tokens:,} tokens, at most {plan.budget_tokens:,} (--budget); at "
        f"{plan.tokens_per_s:,.0f} tokens/s about {_duration(plan.seconds)}"
    )


def _show(built: Built) -> None:
    from edgelora.cli.charts import coefficients_chart

    if built.verdict is not None:
        console.out.print(_candidates(built, built.verdict))
    console.out.print(f"written: {escape(built.chosen)}", style="bold")
    largest = sorted(built.coefficients.items(), key=lambda item: -abs(item[1]))
    shown = largest[:_N_CHARTED]
    console.out.print(coefficients_chart([n for n, _ in shown], [c for _, c in shown]))
    if len(largest) > len(shown):
        console.show(f"and {len(largest) - len(shown)} smaller ones: edgelora show {built.out}")
    console.out.print(
        f"rank up to {built.merge.max_rank}; the combination is kept with a relative error of "
        f"{built.merge.error:.3f} ({built.merge.energy:.1%} of its energy)"
    )
    if built.judgement is not None:
        j = built.judgement
        low, mid, high = j.interval
        console.out.print(
            f"loss on {j.n_examples} examples ({j.part}): base {j.base_loss:.3f}, adapter "
            f"{j.adapter_loss:.3f} nats a token; difference {mid:+.3f} [{low:+.3f}, {high:+.3f}]",
            style="bold",
            markup=False,
        )
    size = built.out.stat().st_size / 1e6
    console.show(
        f"{built.out} ({size:.1f} MB), {built.n_tokens:,} tokens, {_duration(built.elapsed_s)}"
    )


def _candidates(built: Built, verdict: Verdict) -> Table:
    table = Table("candidate", title="loss, nats a token", title_justify="left")
    for name in ("support", "selection"):
        table.add_column(name, justify="right")
    table.add_row("base", "", f"{verdict.base_loss:.3f}")
    for row in verdict.table:
        mark = " <- written" if row.name == built.chosen else ""
        support = built.support_losses.get(row.name, math.nan)
        table.add_row(escape(row.name) + mark, f"{support:.3f}", f"{row.loss:.3f}")
    return table


def _as_json(built: Built) -> dict[str, object]:
    judged = built.judgement
    return {
        "out": str(built.out),
        "chosen": built.chosen,
        "coefficients": built.coefficients,
        "distances": built.distances,
        "losses_alone": built.losses_alone,
        "support_losses": built.support_losses,
        "selection_losses": {
            row.name: row.loss for row in (built.verdict.table if built.verdict else ())
        },
        "judged": judged
        and {
            "part": judged.part,
            "examples": judged.n_examples,
            "base": judged.base_loss,
            "adapter": judged.adapter_loss,
            "adapter_vs_base": judged.interval,
        },
        "rank": built.merge.max_rank,
        "relative_error": built.merge.error,
        "n_tokens": built.n_tokens,
        "elapsed_s": built.elapsed_s,
        "warnings": list(built.warnings),
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
