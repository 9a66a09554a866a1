"""`edgelora pull`: bases and adapters from the Hugging Face Hub; and what is here already."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.bank.adding import ADDED, ALREADY_THERE, REFUSED, SIGNED, Outcome
from edgelora.cli import console
from edgelora.cli.options import base_option, json_option, type_option

if TYPE_CHECKING:
    from edgelora.pull.adapters import Pulled, Wanted


@click.group()
def command() -> None:
    """Fetch a base or adapters from the Hugging Face Hub; afterwards no network is needed."""


@command.command()
@click.argument("name", required=False)
@click.option("--quant", help="Type of the weights, e.g. Q4_K_M, where there are several.")
@click.option("--file", help="Which GGUF of the repository, where there are several.")
@click.option("--local", is_flag=True, help="List the bases that are on this machine already.")
@json_option
@console.common_options
def base(
    name: str | None, quant: str | None, file: str | None, local: bool, as_json: bool, **_: Any
) -> None:
    """Fetch a base by its name here, or by org/name of the Hub, into the folder of models."""
    from edgelora.pull.base import pull_base

    if local != (name is None):
        raise click.UsageError("Give a base's name, or --local to list what is here.")
    if name is None:
        _show_local(as_json)
        return
    with console.transfers() as transfer:
        pulled = pull_base(
            name,
            file=file,
            quant=quant,
            progress=lambda done, total: transfer(name, done, total),
            warn=_warn,
        )
    if as_json:
        console.show_json({**vars(pulled), "path": str(pulled.path)})
        return
    console.say("already there, the same bytes" if pulled.was_there else "fetched and checked")
    if pulled.licence:
        console.say(f"licence: {console.safe(pulled.licence)}")
    console.show(str(pulled.path))


@command.command()
@click.argument("names", nargs=-1, required=True)
@base_option
@click.option(
    "--bank", "bank_path", required=True, type=click.Path(path_type=Path), help="Folder of a bank."
)
@click.option("--tasks", multiple=True, help="Of lots-of-loras: these (task022, '*snli*' ...).")
@click.option(
    "--for",
    "data",
    type=click.Path(path_type=Path),
    help="Of lots-of-loras: those nearest to this dataset.",
)
@click.option("--top", type=click.IntRange(min=1), help="With --for: how many (default: 32).")
@click.option("--dataset", help="Of one org/name: the Hub's dataset it was trained on (org/name).")
@click.option("--template", help="Of org/name: the prompt template it was trained with.")
@click.option("--no-signatures", is_flag=True, help="Fetch no datasets and embed nothing.")
@type_option
@json_option
@console.common_options
def bank(
    names: tuple[str, ...],
    base: str,
    bank_path: Path,
    tasks: tuple[str, ...],
    data: Path | None,
    top: int | None,
    dataset: str | None,
    template: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fetch adapters into a bank: lots-of-loras (all, --tasks or --for), or any org/name.

    Each is converted, its dataset becomes its signature, and what was fetched is dropped. Run
    again, it goes on where it stopped.
    """
    collection, wanted = _wanted(names, tasks, data, top, dataset, template)
    _say_plan(wanted, bank_path, collection)
    try:
        pulled = _pull(wanted, bank_path, base, collection, **options)
    except KeyboardInterrupt:
        console.say("what has come is kept: the same command goes on from there")
        raise
    if as_json:
        console.show_json([{**vars(o), "folder": o.folder.as_posix()} for o in pulled.outcomes])
    else:
        _show_outcomes(pulled.outcomes)
    if pulled.stopped is not None:
        raise pulled.stopped
    raise SystemExit(int(any(outcome.status == REFUSED for outcome in pulled.outcomes)))


def _wanted(
    names: tuple[str, ...],
    tasks: tuple[str, ...],
    data: Path | None,
    top: int | None,
    dataset: str | None,
    template: str | None,
) -> tuple[bool, Sequence[Wanted]]:
    """Whether it is the collection, and the adapters that are meant."""
    from edgelora.bank.names import derive_name
    from edgelora.bank.records import Facts
    from edgelora.pull import lots_of_loras
    from edgelora.pull.adapters import Wanted

    chosen = (*tasks, *names[1:])
    if names[0] == lots_of_loras.COLLECTION:
        if dataset or template or (data and chosen) or (top and not data):
            raise click.UsageError(
                "lots-of-loras takes --tasks, or --for with --top; its datasets and its template "
                "are known."
            )
        if data is not None:
            return True, lots_of_loras.nearest_wanted(data, top or 32)
        return True, lots_of_loras.find_wanted(chosen)
    if tasks or data or top:
        raise click.UsageError("--tasks, --for and --top are for lots-of-loras.")
    if dataset and len(names) > 1:
        raise click.UsageError("--dataset is for one repository.")
    facts = Facts(template=template)
    return False, [
        Wanted(derive_name(Path(name.rpartition("/")[2])), name, dataset, facts) for name in names
    ]


def _say_plan(wanted: Sequence[Wanted], bank_path: Path, collection: bool) -> None:
    """What comes over the line and what stays; refused where it cannot fit."""
    from edgelora.errors import BankError
    from edgelora.pull.lots_of_loras import FETCHED_BYTES, KEPT_BYTES

    if not collection:
        console.say(f"{len(wanted)} adapters")
        return
    fetched, kept = (len(wanted) * n / 1e9 for n in (FETCHED_BYTES, KEPT_BYTES))
    there = next(folder for folder in (bank_path, *bank_path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    console.say(
        f"{len(wanted)} adapters: at most {fetched:.2f} GB to fetch beside their datasets, "
        f"{kept:.2f} GB to keep, {free:.2f} GB free"
    )
    if not any((bank_path / "adapters").glob("*.gguf")) and kept > free:
        raise BankError(
            f"{bank_path}: {kept:.2f} GB are needed and {free:.2f} GB are free",
            hint="Choose some with --tasks or --for, or another disk with --bank.",
        )


def _pull(
    wanted: Sequence[Wanted],
    bank_path: Path,
    base: str,
    collection: bool,
    *,
    no_signatures: bool,
    dtype: str,
    threads: int,
    seed: int,
) -> Pulled:
    from edgelora.adapters.base import read_base
    from edgelora.bank import open_bank
    from edgelora.bank.embedding import open_embedder
    from edgelora.bases import resolve
    from edgelora.datasets.read import read_dataset
    from edgelora.pull.adapters import pull_adapters
    from edgelora.pull.lots_of_loras import read_rows

    header = read_base(resolve(base))
    opened = open_bank(bank_path, create=True)
    embedder = open_embedder(header.path, n_threads=threads, seed=seed, warn=_warn)
    with embedder as embed, console.transfers() as transfer:
        return pull_adapters(
            opened,
            header,
            wanted,
            embed=embed,
            with_signatures=not no_signatures,
            dtype=dtype,
            read_data=read_rows if collection else read_dataset,
            listener=_listener(len(wanted), transfer),
        )


def _listener(n_wanted: int, transfer: Callable[[str, int, int], None]) -> Any:
    from edgelora.pull.adapters import Listener

    n_done = 0

    def done() -> None:
        nonlocal n_done
        n_done += 1

    def place() -> str:
        return f"{n_done + 1} of {n_wanted}"

    return Listener(
        stage=lambda name, stage: transfer(f"{place()}: {stage} {name}", 0, 0),
        transfer=lambda file, n, total: transfer(f"{place()}: {file}", n, total),
        done=done,
        warn=_warn,
    )


def _warn(text: str) -> None:
    console.warn(console.safe(text))


def _show_outcomes(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        for note in outcome.notes:
            _warn(f"{outcome.folder.as_posix()}: {note}")
    for outcome in sorted(outcomes, key=lambda o: o.status == REFUSED):
        where = f" ({outcome.data})" if outcome.data else ""
        name = outcome.name or outcome.folder.as_posix()
        console.show(f"{outcome.status + ':':15}{name}{where}")
        for line in outcome.reason.splitlines():
            console.show(f"    {line}")
    statuses = (ADDED, SIGNED, ALREADY_THERE, REFUSED)
    counts = [(status, sum(o.status == status for o in outcomes)) for status in statuses]
    console.show(", ".join(f"{n} {status}" for status, n in counts if n or status == REFUSED))
    unsigned = [outcome.name for outcome in outcomes if outcome.name and not outcome.has_signature]
    if unsigned:
        _warn(
            f"{len(unsigned)} without a signature: operators that need one will skip "
            f"{', '.join(unsigned[:5])}{' ...' if len(unsigned) > 5 else ''}"
        )


def _show_local(as_json: bool) -> None:
    from edgelora.bases import models_folder
    from edgelora.local_bases import find_bases

    found = find_bases(models_folder())
    if as_json:
        console.show_json([{**vars(base), "path": str(base.path)} for base in found])
        return
    if not found:
        console.say("no GGUF base in the folder of models, the Hugging Face cache or Ollama")
        return
    titles = ("where", "GB", "architecture", "--base")
    rows = [
        (base.where, f"{base.size_bytes / 1e9:.2f}", base.architecture, base.name) for base in found
    ]
    console.show_columns([titles, *rows], right=(1,))
