"""`edgelora pull`: bases and adapters from the Hugging Face Hub; and what is here already."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.bank.adding import ADDED, ALREADY_THERE, REFUSED, SIGNED, Outcome
from edgelora.cli import console
from edgelora.cli.options import (
    base_option,
    embed_option,
    json_option,
    load_dataset,
    low_ram_option,
    type_option,
)

DEFAULT_TOP = 32

if TYPE_CHECKING:
    from edgelora.datasets.records import Dataset
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
@click.option("--name", help="Of one org/name: its name in the bank (default: the repository's).")
@click.option("--no-signatures", is_flag=True, help="Fetch no datasets and embed nothing.")
@embed_option
@low_ram_option
@type_option
@json_option
@console.common_options
@console.tells_memory
def bank(
    names: tuple[str, ...],
    base: str,
    bank_path: Path,
    tasks: tuple[str, ...],
    data: Path | None,
    top: int | None,
    dataset: str | None,
    template: str | None,
    name: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fetch adapters into a bank: lots-of-loras (all, --tasks or --for), or any org/name.

    Each is converted, its dataset becomes its signature, and what was fetched is dropped. Run
    again, it goes on where it stopped.
    """
    from edgelora.pull.lots_of_loras import COLLECTION

    collection = names[0] == COLLECTION
    if collection and (dataset or template or name):
        raise click.UsageError("--dataset, --template and --name are for org/name.")
    if not collection and (tasks or data or top):
        raise click.UsageError("--tasks, --for and --top are for lots-of-loras.")
    if collection:
        wanted = _of_the_collection((*tasks, *names[1:]), data, top, options["seed"])
    else:
        wanted = _of_repositories(names, dataset, template, name)
    _say_plan(wanted, bank_path, collection, signatures=not options["no_signatures"])
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


def _of_the_collection(
    tasks: tuple[str, ...], data: Path | None, top: int | None, seed: int
) -> Sequence[Wanted]:
    from edgelora.pull.lots_of_loras import find_wanted, nearest_wanted

    if (data and tasks) or (top and not data):
        raise click.UsageError("--tasks and --for exclude each other; --top belongs to --for.")
    if data is None:
        return find_wanted(tasks)
    examples = load_dataset(data).examples
    wanted, left_out = nearest_wanted(examples, top or DEFAULT_TOP, seed=seed)
    console.say(f"nearest: {console.safe(', '.join(one.name for one in wanted))}")
    if left_out:
        console.say(f"{len(left_out)} adapters were not compared: nobody counted their data")
    return wanted


def _of_repositories(
    names: tuple[str, ...], dataset: str | None, template: str | None, name: str | None
) -> Sequence[Wanted]:
    from edgelora.bank.names import derive_name
    from edgelora.bank.records import Facts
    from edgelora.pull.adapters import Wanted

    if len(names) > 1 and (dataset or name):
        raise click.UsageError("--dataset and --name are for one repository.")
    chosen = [name or derive_name(Path(one.rpartition("/")[2])) for one in names]
    if len({one.casefold() for one in chosen}) < len(chosen):
        raise click.UsageError("Two of them would have one name: pull them apart, with --name.")
    facts = Facts(template=template)
    return [Wanted(*pair, dataset, facts) for pair in zip(chosen, names, strict=True)]


def _say_plan(
    wanted: Sequence[Wanted], bank_path: Path, collection: bool, *, signatures: bool
) -> None:
    """What comes over the line and what stays; refused where it cannot fit."""
    from edgelora.errors import BankError
    from edgelora.suggest.catalogue import CONVERTED_BYTES, DOWNLOAD_BYTES

    if not collection:
        console.say(f"{len(wanted)} adapters")
        return
    fetched, kept = (len(wanted) * n / 1e9 for n in (DOWNLOAD_BYTES, CONVERTED_BYTES))
    there = next(folder for folder in (bank_path, *bank_path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    console.say(
        f"{len(wanted)} adapters: at most {fetched:.2f} GB to fetch beside their datasets, "
        f"{kept:.2f} GB to keep, {free:.2f} GB free"
    )
    if signatures:
        console.say(
            "signatures: the base reads 64 prompts and answers of each dataset, some minutes at 7B "
            "(--no-signatures leaves that for later)"
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
    **how: Any,
) -> Pulled:
    from edgelora.adapters.base import read_base
    from edgelora.bank import open_bank
    from edgelora.bank.embedding import DEFAULT_LIMIT_S, layers_for, open_embedder
    from edgelora.bases import resolve
    from edgelora.pull.adapters import Listener, pull_adapters

    header = read_base(resolve(base))
    opened = open_bank(bank_path, create=True)
    with console.transfers() as transfer:
        shown = _Shown(len(wanted), transfer)
        with open_embedder(
            header.path,
            n_layers=layers_for(opened, header),
            n_threads=threads,
            **how,
            limit_s=DEFAULT_LIMIT_S,
            warn=_warn,
            progress=shown.embedded,
        ) as embed:
            return pull_adapters(
                opened, header, wanted,
                embed=embed,
                with_signatures=not no_signatures,
                dtype=dtype,
                read_data=_reader(collection),
                listener=Listener(shown.stage, shown.file, shown.done, _warn),
            )  # fmt: skip


def _reader(collection: bool) -> Callable[[Path], Dataset]:
    """How datasets are read: those of the collection have columns of their own."""
    from edgelora.datasets.read import read_dataset
    from edgelora.pull.lots_of_loras import read_rows

    return read_rows if collection else read_dataset


class _Shown:
    """What the bar says: which adapter of how many, and what is done with it."""

    def __init__(self, n_wanted: int, transfer: Callable[[str, int, int], None]) -> None:
        self._n_wanted = n_wanted
        self._transfer = transfer
        self._n_done = 0
        self._stage = ""
        self._n_texts = 0

    def stage(self, name: str, stage: str) -> None:
        """Converting, embedding ..."""
        self._stage, self._n_texts = f"{stage} {name}", 0
        self._transfer(f"{self._place()}: {self._stage}", 0, 0)

    def file(self, file: str, done: int, total: int) -> None:
        """A file comes."""
        self._transfer(f"{self._place()}: {file}", done, total)

    def embedded(self, n_texts: int) -> None:
        """So many texts more."""
        self._n_texts += n_texts
        self._transfer(f"{self._place()}: {self._stage}, {self._n_texts} texts", 0, 0)

    def done(self) -> None:
        """The next one."""
        self._n_done += 1

    def _place(self) -> str:
        return f"{self._n_done + 1} of {self._n_wanted}"


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
            f"{', '.join(unsigned[:5])}{' ...' if len(unsigned) > 5 else ''}. "
            "The same command without --no-signatures (or with --dataset) makes them."
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
