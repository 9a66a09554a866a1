"""`edgelora bank calibrate`: temperatures, shortlist and priors fitted on the bank itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.bank import Bank, BankRecord, open_bank
from edgelora.cli import console
from edgelora.cli.options import json_option, low_ram_option

if TYPE_CHECKING:
    from edgelora.operators.calibration import Calibration, Evidence, Fit

_FEW = 5


@click.command()
@click.option(
    "--bank", "bank_path", required=True, type=click.Path(path_type=Path), help="Folder of a bank."
)
@click.option("--base", required=True, help="A GGUF file or a base's name.")
@click.option("--data-glob", help="Datasets to measure on, e.g. 'data/{name}.jsonl'.")
@click.option("--prompt-key", help="Column of the datasets' prompts.")
@click.option("--completion-key", help="Column of the datasets' completions.")
@click.option("--template", help="Prompt template to use (default: the base's own).")
@click.option("--lines", type=click.IntRange(min=2), default=4, show_default=True,
              help="Of each dataset, drawn by the seed.")  # fmt: skip
@click.option("--budget", type=click.IntRange(min=1), default=1_000_000, show_default=True,
              help="Tokens that it may compute.")  # fmt: skip
@click.option("--distance", "distances", multiple=True, default=("bures", "cosine"),
              show_default=True, help="To fit a temperature for; repeatable.")  # fmt: skip
@click.option("--share", type=click.FloatRange(0.0, 1.0, min_open=True), default=0.9,
              show_default=True, help="Of the datasets whose best adapter the shortlist holds."
              )  # fmt: skip
@low_ram_option
@json_option
@console.common_options
@console.tells_memory
def calibrate(
    bank_path: Path, base: str, distances: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Fit temperatures, shortlist size and priors on the bank's own datasets and adapters."""
    from edgelora.adapters.base import read_base
    from edgelora.bank.calibrating import compare_datasets, draw_targets, signed_adapters
    from edgelora.bank.calibration import write_calibration
    from edgelora.bases import resolve
    from edgelora.operators.calibration import calibrate as fit

    _refuse_unknown(distances)
    bank, path = open_bank(bank_path), resolve(base)
    base_id = read_base(path).identity.id
    records = signed_adapters(bank, base_id)
    targets = draw_targets(records, options["seed"])
    with console.stages() as advance:
        comparing = functools.partial(advance, "comparing datasets")
        evidence = compare_datasets(
            bank, records, targets, distances, seed=options["seed"], progress=comparing
        )
    if options["data_glob"]:
        evidence = _measured(bank, path, records, targets, evidence, **options)
    with console.stages() as advance:
        fitting = functools.partial(advance, "mixture matching")
        values = fit(evidence, share=options["share"], progress=fitting)
    written = write_calibration(bank, base_id, values)
    if as_json:
        console.show_json({"file": str(written), **asdict(values)})
    else:
        _show(written, values)


def _refuse_unknown(distances: Sequence[str]) -> None:
    from edgelora.operators.distances import DISTANCES

    for name in distances:
        if name not in DISTANCES:
            raise click.BadParameter(
                f"{name}; one of {', '.join(DISTANCES)}", param_hint="--distance"
            )


def _measured(
    bank: Bank,
    base: Path,
    records: Sequence[BankRecord],
    targets: Sequence[str],
    evidence: Evidence,
    *,
    data_glob: str,
    prompt_key: str | None,
    completion_key: str | None,
    template: str | None,
    lines: int,
    budget: int,
    threads: int,
    low_ram: bool | None,
    seed: int,
    **_: Any,
) -> Evidence:
    """The evidence with losses."""
    from edgelora.bank.calibrating import add_losses, find_datasets, make_targets
    from edgelora.cli.options import open_engine
    from edgelora.datasets.read import read_dataset
    from edgelora.engine.prepare import model_template

    read = functools.partial(read_dataset, prompt_key=prompt_key, completion_key=completion_key)
    datasets = find_datasets(records, targets, data_glob, read)
    with open_engine(base, threads, low_ram) as model, console.stages() as advance:
        used = model_template(model, template)
        return add_losses(
            bank,
            model,
            records,
            evidence,
            make_targets(model, used, datasets, lines, seed),
            n_lines=lines,
            budget_tokens=budget,
            plan=_show_plan,
            progress=functools.partial(advance, "measuring adapters, tokens"),
        )


def _show_plan(n_adapters: int, n_tokens: int) -> None:
    console.say(
        f"plan: {n_adapters} adapter(s), the base included, to measure: {n_tokens:,} tokens"
    )


def _show(path: Path, values: Calibration) -> None:
    console.show(f"fitted on {values.n_targets} datasets of the bank, by {values.evidence}")
    rows: list[tuple[str, ...]] = [("of", "temperature", "score", "equal weights", "shortlist")]
    for name, fit in values.distances.items():
        rows.append((f"softmin of {name}", *_cells(fit), str(values.shortlists[name])))
    for title, fitted in (("mixture, lambda", values.mixture), ("losses", values.gibbs)):
        if fitted is not None:
            rows.append((title, *_cells(fitted), ""))
    console.show_columns(rows, right=(1, 2, 3, 4))
    if values.priors:
        ranked = sorted(values.priors.items(), key=lambda item: -item[1])
        most = ", ".join(f"{name} {prior:.2f}" for name, prior in ranked[:_FEW])
        least = ", ".join(f"{name} {prior:.2f}" for name, prior in ranked[-_FEW:])
        console.show(f"help most often: {most}")
        console.show(f"help least often: {least}")
    console.show(f"{path}; `edgelora build` uses it")


def _cells(fit: Fit) -> tuple[str, str, str]:
    return f"{fit.temperature:.4g}", f"{fit.score:.3f}", f"{fit.uniform:.3f}"


def calibration_facts(bank: Bank, records: Sequence[BankRecord]) -> list[dict[str, str]]:
    """The calibrations in a bank's folder, each with what it is worth now."""
    from edgelora.bank.calibration import calibration_files, parse_calibration, read_limited
    from edgelora.errors import InvalidFile

    facts = []
    for path in calibration_files(bank):
        try:
            stored = parse_calibration(read_limited(path), path.name)
            state = f"by {stored.values.evidence} of {stored.values.n_targets} datasets"
            if stored.is_stale(records):
                state += "; of another set of adapters, so it is not used"
        except InvalidFile as error:
            state = f"damaged: {error.what}"
        facts.append({"file": path.name, "state": state})
    return facts
