"""`edgelora build`: one adapter for a dataset, combined from a bank."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
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
    from edgelora.build.records import PassLoss, Refined
    from edgelora.operators.arbiter import Verdict

_N_CHARTED = 15
_N_RANKED = 5


@click.command()
@model_options
@click.option(
    "--bank", "bank_path", required=True, type=click.Path(path_type=Path), help="Folder of a bank."
)
@functools.partial(data_options, required=False)
@click.option("--describe", help="Instead of --data: the task in words, nothing else.")
@click.option(
    "--from",
    "recorded",
    type=click.Path(path_type=Path),
    help="Instead of --data: an adapter whose own record is followed again.",
)
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The adapter to write."
)
@click.option("--budget", type=click.IntRange(min=1), help="Tokens that it may compute.")
@click.option(
    "--operator",
    default="auto",
    help="auto: the arbiter chooses; none: only --polish, from scratch.",
)
@click.option(
    "--refine",
    default="auto",
    help="none, forward or gradient; auto (the default): gradient where it can be had.",
)
@click.option(
    "--passes",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Of gradient steps on coefficients, at most.",
)
@click.option(
    "--weights",
    default="component",
    show_default=True,
    help="One coefficient of an adapter for each rank-one component in each tensor, for each "
    "tensor, for each layer, or for the whole adapter.",
)
@click.option("--objective", default="", help="Of the gradient: loss, prompts or entropy.")
@click.option(
    "--polish",
    type=click.IntRange(min=0),
    default=0,
    help="Passes of training of the best candidate's factors (default: none).",
)
@click.option("--distance", help="Between datasets (default: bures; with --describe: cosine).")
@combine_options
@click.option("--exclude", multiple=True, help="Adapters to leave out, a pattern; repeatable.")
@click.option(
    "--uncalibrated", is_flag=True, help="Leave what `bank calibrate` fitted on the bank aside."
)
@click.option("--anew", is_flag=True, help="Measure again what an equal build has found here.")
@click.option("--force", is_flag=True, help="Overwrite; write even if the base is better.")
@json_option
@console.common_options
@console.tells_memory
def command(
    base: str,
    bank_path: Path,
    data: Path | None,
    describe: str | None,
    recorded: Path | None,
    prompt_key: str | None,
    completion_key: str | None,
    out: Path,
    template: str | None,
    low_ram: bool | None,
    as_json: bool,
    threads: int,
    **choices: Any,
) -> None:
    """Combine adapters of a bank into one for your dataset."""
    from edgelora.bank import open_bank
    from edgelora.build import build, build_described
    from edgelora.cli.repeat import repeat_build
    from edgelora.engine.prepare import model_template

    if recorded is not None:
        raise SystemExit(
            repeat_build(recorded, bank_path, base, out, bool(choices["force"]), as_json)
        )
    if (data is None) == (describe is None):
        raise click.UsageError("One of --data and --describe (or --from, to repeat a build).")
    options = _options(is_described=describe is not None, **choices)
    bank = open_bank(bank_path)
    dataset = load_dataset(data, prompt_key, completion_key) if data else None
    with open_engine(base, threads, low_ram) as model, _listener() as listener:
        used = model_template(model, template)
        if dataset is None:
            built = build_described(model, bank, describe or "", used, out, options, listener)
        else:
            built = build(model, bank, dataset, used, out, options, listener)
    if as_json:
        console.show_json(_as_json(built))
    else:
        _show(built)


def _options(
    budget: int | None,
    distance: str | None,
    is_described: bool,
    uncalibrated: bool,
    anew: bool,
    **choices: Any,
) -> Any:
    from edgelora.build.described import DESCRIBED_DISTANCE
    from edgelora.build.proposals import OPERATOR_NAMES
    from edgelora.build.records import (
        DEFAULT_BUDGET,
        DEFAULT_DISTANCE,
        DEFAULT_LIMIT_S,
        REFINEMENTS,
        Options,
    )
    from edgelora.gradient.descent import OBJECTIVES
    from edgelora.gradient.variables import WEIGHTS
    from edgelora.operators.distances import DISTANCES

    usual = DESCRIBED_DISTANCE if is_described else DEFAULT_DISTANCE
    options = Options(distance=distance or usual, calibrated=not uncalibrated, **choices)
    for name, value, known in (
        ("--operator", options.operator, OPERATOR_NAMES),
        ("--distance", options.distance, DISTANCES),
        ("--refine", options.refine, REFINEMENTS),
        ("--weights", options.weights, WEIGHTS),
        ("--objective", options.objective, ("", *OBJECTIVES)),
    ):
        if value not in known:
            raise click.BadParameter(f"{value}; one of {', '.join(known)}", param_hint=name)
    limit_s = math.inf if budget else DEFAULT_LIMIT_S
    return replace(options, budget_tokens=budget or DEFAULT_BUDGET, limit_s=limit_s, reuse=not anew)


@contextlib.contextmanager
def _listener() -> Iterator[Listener]:
    """A bar for each stage on stderr, the plan above them, warnings as they come."""
    from edgelora.build import Listener

    with console.stages() as advance:
        yield Listener(
            plan=_show_plan,
            progress=advance,
            warn=lambda message: console.warn(console.safe(message)),
            passed=_show_pass,
            keep=console.confirm,
        )


def _show_plan(plan: Plan) -> None:
    _show_forward_plan(plan)
    if plan.gradient is None:
        return
    g = plan.gradient
    steps = []
    if g.n_passes:
        folds = f" in {g.n_folds} folds" if g.n_folds else ""
        folds += f", stopped by {g.n_held_out} other examples" if g.n_held_out else ""
        steps.append(f"at most {g.n_passes} pass(es) on coefficients{folds}")
    if g.n_polish:
        steps.append(f"{g.n_polish} on factors")
    examples = f"{g.n_examples} examples ({g.n_rows:,} tokens) each"
    console.say(f"      gradients: {' and '.join(steps)}, {examples}")
    console.say(
        f"      about {g.n_tokens:,} of the tokens (a gradient pass counts three), at "
        f"{g.tokens_per_s:,.0f} tokens/s {_duration(g.n_tokens / g.tokens_per_s)}; memory about "
        f"{g.memory_bytes / 1e6:,.0f} MB" + (", the rest in a temporary file" * g.on_disk)
    )


def _show_pass(losses: PassLoss) -> None:
    parts = []
    if math.isfinite(losses.support):
        parts.append(f"support {losses.support:.3f}")
    if losses.held_out is not None:
        parts.append(f"held out {losses.held_out:.3f}")
    when = f"pass {losses.n_done} of {losses.n_passes}" if losses.n_done else "start"
    console.say(f"{losses.stage}, {when}: {', '.join(parts)}")


def _show_forward_plan(plan: Plan) -> None:
    if plan.by == "an earlier build":
        console.say(
            "plan: the same build was measured here before, so it begins at the merge, about "
            f"{_duration(plan.merge_s)} (--anew measures again)"
        )
        return
    if math.isnan(plan.tokens_per_s):
        decided = {
            "distances": f"distances from {plan.n_support} examples to",
            "activations": f"activations of the base on {plan.n_support} examples, and of",
            "description": "distances from the description to the mean prompts of",
        }[plan.by]
        console.say(f"plan: {decided} {plan.n_adapters} adapters; {plan.n_tokens:,} tokens at most")
        if plan.is_cut:
            console.say(f"      at most {plan.budget_tokens:,} tokens ({_chosen_by(plan)})")
        return
    parts = (
        f"{plan.n_support} examples to find coefficients (support), {plan.n_selection} to "
        f"choose (selection), {plan.n_untouched or 'none'} untouched"
        if plan.n_selection
        else f"{plan.n_support} examples to find coefficients (support), and by cross-validation "
        "to choose"
    )
    console.say(
        f"plan: {parts}; {plan.n_measured} of {plan.n_adapters} adapters measured on "
        f"{plan.n_shown} examples"
    )
    console.say(
        f"      about {plan.n_tokens:,} tokens, at most {plan.budget_tokens:,} "
        f"({_chosen_by(plan)}); at {plan.tokens_per_s:,.0f} tokens/s about "
        f"{_duration(plan.seconds)}"
    )


def _chosen_by(plan: Plan) -> str:
    if not plan.is_cut:
        return "--budget"
    from edgelora.build.records import DEFAULT_LIMIT_S

    return f"what {DEFAULT_LIMIT_S / 60:.0f} min allow here; --budget allows more"


def _show(built: Built) -> None:
    from edgelora.cli.charts import coefficients_chart

    if built.verdict is not None:
        console.out.print(_candidates(built, built.verdict))
    if built.refined is not None:
        _show_ranking(built, built.refined)
    console.out.print(f"written: {escape(built.chosen)}", style="bold")
    largest = sorted(built.coefficients.items(), key=lambda item: -abs(item[1]))
    shown = largest[:_N_CHARTED]
    if shown:
        console.out.print(coefficients_chart([n for n, _ in shown], [c for _, c in shown]))
    if len(largest) > len(shown):
        console.show(f"and {len(largest) - len(shown)} smaller ones: edgelora show {built.out}")
    if built.merge is not None:
        console.out.print(
            f"rank up to {built.merge.max_rank}; the combination is kept with a relative error of "
            f"{built.merge.error:.3f} ({built.merge.energy:.1%} of its energy)"
        )
    _show_judgement(built)
    size = built.out.stat().st_size / 1e6
    console.show(
        f"{built.out} ({size:.1f} MB), {built.n_tokens:,} tokens, {_duration(built.elapsed_s)}"
    )


def _show_ranking(built: Built, refined: Refined) -> None:
    """The bank ranked by one gradient pass, beside the ranking by distances of embeddings."""
    if not refined.slopes:
        return
    slopes = dict(sorted(refined.slopes.items(), key=lambda item: item[1]))
    top = list(slopes)[:_N_RANKED]
    steepest = ", ".join(f"{name} ({slopes[name]:+.2f})" for name in top)
    console.show(f"steepest slopes at the base, of {len(slopes)} adapters: {steepest}")
    if not built.distances:
        return
    nearest = sorted(built.distances, key=lambda name: built.distances[name])
    near = ", ".join(f"{name} ({list(slopes).index(name) + 1})" for name in nearest[:_N_RANKED])
    n_both = len(set(top) & set(nearest[:_N_RANKED]))
    console.show(f"nearest by embedding, with their place by slope: {near}; {n_both} in both")


def _show_judgement(built: Built) -> None:
    if built.judgement is None:
        return
    j = built.judgement
    low, mid, high = j.interval
    console.out.print(
        f"loss on {j.n_examples} examples ({j.part}): base {j.base_loss:.3f}, adapter "
        f"{j.adapter_loss:.3f} nats a token; difference {mid:+.3f} [{low:+.3f}, {high:+.3f}]",
        style="bold",
        markup=False,
    )


def _candidates(built: Built, verdict: Verdict) -> Table:
    from edgelora.build.records import CROSSED

    table = Table("candidate", title="loss, nats a token", title_justify="left")
    crossed = built.judgement is not None and built.judgement.part == CROSSED
    for name in ("support", CROSSED if crossed else "selection"):
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
        "rank": built.merge and built.merge.max_rank,
        "relative_error": built.merge and built.merge.error,
        "refined": built.refined and asdict(built.refined),
        "trained": built.trained and asdict(built.trained),
        "n_tokens": built.n_tokens,
        "elapsed_s": built.elapsed_s,
        "stages_s": dict(built.seconds),
        "planned": built.plan
        and {
            "tokens": built.plan.n_tokens,
            "seconds": built.plan.seconds,
            "told_after_s": built.planned_s,
        },
        "peak_memory": console.peak_memory(),
        "warnings": list(built.warnings),
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
