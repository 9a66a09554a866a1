"""`edgelora bank evaluate`: what a bank is worth for new tasks, measured on its own."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import console
from edgelora.cli.options import json_option, model_options, open_engine, show_template_warnings

if TYPE_CHECKING:
    from edgelora.adapters.base import Base
    from edgelora.bank import Bank
    from edgelora.build import Options
    from edgelora.leave_one_out.lines import Row
    from edgelora.leave_one_out.run import Each, Measure, Settings
    from edgelora.leave_one_out.shares import Recovered
    from edgelora.leave_one_out.summary import ArmSummary


@click.command()
@model_options
@click.option(
    "--bank", "bank_path", required=True, type=click.Path(path_type=Path), help="Folder of a bank."
)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with ADAPTER/train.jsonl and ADAPTER/test.jsonl.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file that lines of results are added to.",
)
@click.option(
    "--split",
    type=click.Choice(["task", "source", "category"]),
    default="source",
    show_default=True,
    help="What is hidden with a task's own adapter: nothing, its source, its category.",
)
@click.option(
    "--labels", type=click.IntRange(min=2), default=16, show_default=True, help="Lines to build on."
)
@click.option(
    "--test", "n_test", type=click.IntRange(min=1), default=50, show_default=True,
    help="Lines to judge by.",
)  # fmt: skip
@click.option("--task", "tasks", multiple=True, help="Only adapters of this name; a pattern.")
@click.option("--no-generate", is_flag=True, help="Loss only: no answers, far quicker.")
@click.option("--scheduler", help="Measure on the workers of this Dask scheduler: tcp://HOST:PORT.")
@json_option
@console.common_options
@console.tells_memory
def evaluate(
    base: str,
    bank_path: Path,
    data: Path,
    output: Path,
    split: str,
    labels: int,
    n_test: int,
    tasks: tuple[str, ...],
    template: str | None,
    low_ram: bool | None,
    no_generate: bool,
    scheduler: str | None,
    as_json: bool,
    threads: int,
    seed: int,
) -> None:
    """Hide each adapter and its kin, build for its task without them, and compare.

    The arms are the base, the uniform mean at its best scale, the default build, and the task's own
    adapter. Lines are added to the output as they are measured: stopped, it goes on there.
    """
    from edgelora.leave_one_out.run import Settings
    from edgelora.leave_one_out.summary import summarise_arms

    settings = Settings(split, labels, n_test, seed, tasks, not no_generate)
    how = {"template": template, "n_threads": threads, "low_ram": low_ram}
    rows = _evaluate(base, bank_path, data, output, settings, scheduler, how)
    found = summarise_arms(rows)
    if as_json:
        console.show_json({"bank": str(bank_path), "rows": rows, "arms": list(map(asdict, found))})
    else:
        _show(found)


def _evaluate(
    base_name: str,
    bank_path: Path,
    data: Path,
    output: Path,
    settings: Settings,
    scheduler: str | None,
    how: dict[str, Any],
) -> list[Row]:
    from edgelora.adapters.base import read_base
    from edgelora.bank import open_bank
    from edgelora.bases import resolve
    from edgelora.build import Options
    from edgelora.leave_one_out.run import evaluate_bank
    from edgelora.metrics import rouge_l

    if settings.with_answers:
        rouge_l("probe", ["probe"])  # a missing package is told before any work
    base, bank = read_base(resolve(base_name)), open_bank(bank_path)
    options = Options(seed=settings.seed)
    with (
        _open_measure(base, bank, scheduler, options, how) as (measure, each),
        console.stages() as progress,
    ):
        return evaluate_bank(
            base, bank, data, output, measure, settings, each=each, progress=progress, warn=_warn
        )


@contextlib.contextmanager
def _open_measure(
    base: Base, bank: Bank, scheduler: str | None, options: Options, how: dict[str, Any]
) -> Iterator[tuple[Measure, Each]]:
    """How arms are measured: here, or on the workers of a scheduler."""
    from edgelora.engine.prepare import model_template
    from edgelora.hub.offline import require_network
    from edgelora.leave_one_out import arms
    from edgelora.leave_one_out.remote import open_remote_measure
    from edgelora.leave_one_out.run import in_turn

    if scheduler is not None:
        require_network("--scheduler")
        with open_remote_measure(base, bank, scheduler, options, **how, warn=_warn) as remote:
            yield remote
        return
    with open_engine(base.path, how["n_threads"], how["low_ram"]) as model:
        template = model_template(model, how["template"])
        yield functools.partial(arms.measure, model, bank, template, options), in_turn
    show_template_warnings(template, set())


def _warn(text: str) -> None:
    console.warn(console.safe(text))


def _show(found: Sequence[ArmSummary]) -> None:
    head = ("arm", "tasks", "loss", "exact", "ROUGE-L", "recovered (95 %)", "median", "below base",
            "worst", "tokens")  # fmt: skip
    console.show_columns([head, *map(_cells, found)], right=(1, 2, 3, 4, 6, 7, 8, 9))
    n = found[0].recovered.n_tasks
    console.say(
        f"recovered share of loss over the {n} of {found[0].n_tasks} tasks whose own adapter gains "
        "more than 0.2 nats; worst: nats a token above the base"
    )


def _cells(arm: ArmSummary) -> tuple[str, ...]:
    share = arm.recovered
    return (
        arm.arm,
        str(arm.n_tasks),
        f"{arm.loss:.4f}",
        *("" if x is None else f"{x:.3f}" for x in (arm.exact_match, arm.rouge_l)),
        _interval(share),
        f"{share.median:.3f}" if share.n_tasks else "",
        f"{share.below:.2f}",
        f"{share.worst:+.3f}",
        f"{arm.n_tokens:,.0f}",
    )


def _interval(share: Recovered) -> str:
    """Nothing where nothing could be recovered; without bounds where one source says nothing."""
    if not share.n_tasks:
        return ""
    bounds = f" [{share.low:.3f}, {share.high:.3f}]" if math.isfinite(share.low) else ""
    return f"{share.ratio:.3f}{bounds}"
