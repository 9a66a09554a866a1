"""`edgelora bank`: convert adapters once, keep them with their signatures, look after them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.bank import Bank, BankRecord, Facts, open_bank
from edgelora.bank.adding import (
    ADDED,
    ALREADY_THERE,
    REFUSED,
    SIGNED,
    Each,
    Embed,
    Outcome,
    add_many,
    one_by_one,
)
from edgelora.bank.requests import make_requests
from edgelora.bank.store import with_template
from edgelora.cli import console
from edgelora.cli.bank_evaluation import evaluate
from edgelora.cli.calibrate import calibrate, calibration_facts
from edgelora.cli.options import embed_option, low_ram_option, to_layers
from edgelora.cli.signatures import signatures

if TYPE_CHECKING:
    from edgelora.adapters.base import Base

TYPES = ("f16", "f32", "bf16", "q8_0")

bank_option = click.option(
    "--bank", "bank_path", required=True, type=click.Path(path_type=Path), help="Folder of a bank."
)
base_option = click.option("--base", required=True, help="A GGUF file or a base's name.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def command() -> None:
    """Convert PEFT adapters once and keep them with their signatures."""


command.add_command(signatures)
command.add_command(calibrate)
command.add_command(evaluate)


@command.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@bank_option
@base_option
@click.option("--data", type=click.Path(path_type=Path), help="What the adapter was trained on.")
@click.option("--data-glob", help="The same for many, e.g. '{parent}/train.jsonl'.")
@click.option("--card-glob", help="JSON with source, licence ..., e.g. '{parent}/task.json'.")
@click.option("--prompt-key", help="Column of the dataset's prompts.")
@click.option("--completion-key", help="Column of the dataset's completions.")
@click.option("--text", "description", help="The task in words; embedded where there is no data.")
@click.option("--template", help="Prompt template it was trained with (default: the base's own).")
@click.option("--licence", help="Licence of the adapter or of its data.")
@click.option("--source", help="Where its data comes from.")
@click.option("--type", "dtype", type=click.Choice(TYPES), default="f16", help="Of the tensors.")
@click.option("--name", help="Its name in the bank (default: the folder's).")
@click.option("--scheduler", help="Embed on the workers of this Dask scheduler: tcp://HOST:PORT.")
@click.option(
    "--layers",
    "n_layers",
    metavar="N|all",
    callback=to_layers,
    help="Layers of the base that embed the data (default: as the bank's signatures; all).",
)
@embed_option
@low_ram_option
@json_option
@console.common_options
@console.tells_memory
def add(
    folders: tuple[Path, ...],
    bank_path: Path,
    base: str,
    data: Path | None,
    data_glob: str | None,
    name: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert PEFT or MLX folders and compute the signature of the data they were trained on.

    Goes on past a folder that is refused; run again, it only does what is missing.
    """
    if len(folders) > 1 and (data or name):
        raise click.UsageError("--data and --name are for one folder; for many, see --data-glob.")
    if data and data_glob:
        raise click.UsageError("--data and --data-glob exclude each other.")
    globs = {"data_glob": data_glob, "card_glob": options.pop("card_glob")}
    how = {key: options.pop(key) for key in ("n_layers", "n_embedded", "low_ram", "seed")}
    how["n_threads"] = options.pop("threads")
    outcomes = _add(folders, bank_path, base, {"data": data, "name": name, **globs}, how, **options)
    if as_json:
        console.show_json([{**vars(o), "folder": str(o.folder)} for o in outcomes])
    else:
        _show_outcomes(outcomes)
    raise SystemExit(int(any(outcome.status == REFUSED for outcome in outcomes)))


def _add(
    folders: Sequence[Path],
    bank_path: Path,
    base_name: str,
    places: dict[str, Any],
    how: dict[str, Any],
    *,
    prompt_key: str | None,
    completion_key: str | None,
    dtype: str,
    scheduler: str | None,
    **facts: str | None,
) -> list[Outcome]:
    from edgelora.adapters.base import read_base
    from edgelora.bank.embedding import layers_for
    from edgelora.bases import resolve
    from edgelora.datasets.read import read_dataset

    base = read_base(resolve(base_name))
    given = Facts(**facts)
    if given.template or not places["card_glob"]:  # wrong for one, it is wrong for all
        given = with_template(given, base)
    requests, refused = make_requests(folders, facts=given, **places)
    bank = open_bank(bank_path, create=True)
    read = functools.partial(read_dataset, prompt_key=prompt_key, completion_key=completion_key)
    how["n_layers"] = layers_for(bank, base, how["n_layers"])
    with (
        _open_embedder(base, scheduler, how) as (embed, each),
        console.progress("adding adapters", len(requests)) as advance,
    ):
        return refused + add_many(
            bank, base, requests, embed=embed, each=each, dtype=dtype, progress=advance,
            read_data=read,
        )  # fmt: skip


@contextlib.contextmanager
def _open_embedder(
    base: Base, scheduler: str | None, how: dict[str, Any]
) -> Iterator[tuple[Embed, Each]]:
    """How data is embedded: here, or on the workers of a scheduler."""
    from edgelora.bank.embedding import DEFAULT_LIMIT_S, open_embedder
    from edgelora.bank.remote import open_remote_embedder
    from edgelora.hub.offline import require_network

    def warn(text: str) -> None:
        console.warn(console.safe(text))

    if scheduler is None:
        with open_embedder(base.path, **how, limit_s=DEFAULT_LIMIT_S, warn=warn) as embed:
            yield embed, one_by_one
        return
    require_network("--scheduler")
    with open_remote_embedder(base, scheduler, **how, warn=warn) as remote:
        yield remote


def _show_outcomes(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        for note in outcome.notes:
            console.warn(console.safe(f"{outcome.folder}: {note}"))
    for outcome in sorted(outcomes, key=lambda o: o.status == REFUSED):
        console.show(
            f"{outcome.status + ':':15}{outcome.name or outcome.folder}{_details(outcome)}"
        )
        for line in outcome.reason.splitlines():
            console.show(f"    {line}")
    counts = [(s, sum(o.status == s for o in outcomes)) for s in (ADDED, SIGNED, ALREADY_THERE)]
    n_refused = sum(outcome.status == REFUSED for outcome in outcomes)
    said = [f"{n} {status}" for status, n in counts if n] + [f"{n_refused} refused"]
    console.show(", ".join(said))
    unsigned = [o.name for o in outcomes if o.name and not o.has_signature]
    if unsigned:
        console.warn(
            f"{len(unsigned)} without a signature: operators that need one will skip "
            f"{', '.join(unsigned[:5])}{' ...' if len(unsigned) > 5 else ''}. "
            "Add again with --data, --data-glob or --text."
        )


def _details(outcome: Outcome) -> str:
    if outcome.status == ALREADY_THERE:
        return " (same bytes: nothing to do)"
    return f" ({outcome.data})" if outcome.data else ""


@command.command()
@bank_option
@json_option
@console.common_options
def ls(bank_path: Path, as_json: bool, **_: Any) -> None:
    """List the adapters of a bank."""
    bank = open_bank(bank_path)
    listing = bank.listing()
    for warning in listing.warnings:
        console.warn(console.safe(warning))
    for file, reason in listing.damaged:
        console.warn(console.safe(f"{file}: damaged: {reason}"))
    if as_json:
        damaged = [{"file": file, "reason": reason} for file, reason in listing.damaged]
        records = [record.to_json() for record in listing.records]
        told = {"bank": str(bank_path), "adapters": records, "damaged": damaged}
        console.show_json(told | {"calibrations": calibration_facts(bank, listing.records)})
        return
    titles = ("name", "rank", "tensors", "type", "MB", "signature", "template", "source")
    console.show_columns([titles, *(_cells(record) for record in listing.records)])
    n_unsigned = sum(not record.has_signature for record in listing.records)
    console.say(f"{len(listing.records)} adapters, {n_unsigned} without a signature")
    for facts in calibration_facts(bank, listing.records):
        console.say(console.safe(f"calibration {facts['file']}: {facts['state']}"))


def _cells(record: BankRecord) -> tuple[str, ...]:
    return (
        record.name,
        _ranks(record),
        str(record.n_tensors),
        record.dtype,
        f"{record.size_bytes / 1e6:.1f}",
        "yes" if record.has_signature else "no",
        "chat" if record.template == "chat" else "own",
        " ".join(record.source.split()),
    )


@command.command()
@click.argument("name")
@bank_option
@json_option
@console.common_options
def show(name: str, bank_path: Path, as_json: bool, **_: Any) -> None:
    """Print all that a bank knows of one adapter."""
    record = open_bank(bank_path).record(name)
    if as_json:
        console.show_json(record.to_json())
        return
    facts = {
        "name": record.name,
        "file": f"{record.path} ({record.size_bytes / 1e6:.1f} MB, {record.dtype})",
        "rank": f"{_ranks(record)}, on {record.n_tensors} tensors",
        "base": record.base.describe(),
        "template": record.template,
        "source": record.source,
        "category": record.category,
        "licence": record.licence,
        "description": record.description,
        "fetched from": record.origin,
        "signature": "yes" if record.has_signature else "no (operators that need one skip it)",
        "made from": f"sha256 {record.source_sha256}",
        "content": f"sha256 {record.content_sha256}",
        "made by": record.created_by,
    }
    for key, value in facts.items():
        if value:
            console.show(f"{key:12} {value}")


@command.command()
@click.argument("names", nargs=-1, required=True)
@bank_option
@console.common_options
def rm(names: tuple[str, ...], bank_path: Path, **_: Any) -> None:
    """Delete adapters and their signatures (damaged ones too)."""
    bank = open_bank(bank_path)
    for name in names:
        bank.remove(name)
        console.say(f"removed {console.safe(name)}")


@command.command()
@bank_option
@click.option("--base", help="Check also that adapters fit this base.")
@json_option
@console.common_options
def verify(bank_path: Path, base: str | None, as_json: bool, **_: Any) -> None:
    """Read every byte: hashes, values, signatures. Exits with 1 if there is a problem."""
    from edgelora.adapters.base import read_base
    from edgelora.bank import verify as checks
    from edgelora.bases import resolve

    bank = open_bank(bank_path)
    n_adapters = len(bank.listing().records)
    header = read_base(resolve(base)) if base else None
    with console.progress("verifying", n_adapters) as advance:
        problems = checks.verify(bank, header, progress=advance)
    if as_json:
        console.show_json({"bank": str(bank_path), "n_adapters": n_adapters, "problems": problems})
    else:
        for problem in problems:
            console.show(f"- {problem}")
        console.show(f"{n_adapters} sound headers, {len(problems)} problems")
    raise SystemExit(int(bool(problems)))


@command.command()
@bank_option
@console.common_options
def reindex(bank_path: Path, **_: Any) -> None:
    """Make the index anew from the adapters' files."""
    listing = open_bank(bank_path).reindex()
    for warning in (*listing.warnings, *(reason for _, reason in listing.damaged)):
        console.warn(console.safe(warning))
    console.say(f"indexed {len(listing.records)} adapters")


@command.command()
@click.argument("name")
@bank_option
@base_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder.")
@console.common_options
def export(name: str, bank_path: Path, base: str, output: Path, **_: Any) -> None:
    """Write an adapter as a PEFT folder that gives the same logits."""
    from edgelora.adapters.base import read_base
    from edgelora.bases import resolve

    bank: Bank = open_bank(bank_path)
    bank.export(name, output, read_base(resolve(base)))
    console.say(f"wrote {console.safe(str(output))}")


def _ranks(record: BankRecord) -> str:
    low, high = record.ranks
    return str(low) if low == high else f"{low}-{high}"
