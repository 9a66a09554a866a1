"""`edgelora bank signatures`: the signatures of a bank in one file, to give and to take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import console

if TYPE_CHECKING:
    from edgelora.bank.sharing import Imported

_N_LISTED = 10
_bank_option = click.option(
    "--bank", "bank_path", required=True, type=click.Path(path_type=Path), help="Folder of a bank."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def signatures() -> None:
    """Write a bank's signatures to one file, or take them from one."""


@signatures.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@_bank_option
@click.option("--base", required=True, help="The base that made them: a GGUF file or a name.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@_json_option
@console.common_options
def export(file: Path, bank_path: Path, base: str, force: bool, as_json: bool, **_: Any) -> None:
    """Write all signatures that a base made to one file."""
    from edgelora.adapters.base import read_base
    from edgelora.bank import open_bank
    from edgelora.bank.sharing import export_signatures
    from edgelora.bases import resolve

    bank = open_bank(bank_path)
    header = read_base(resolve(base))
    with console.progress("reading signatures", len(bank.listing().records)) as advance:
        done = export_signatures(bank, header, file, force=force, progress=advance)
    if done.unsigned:
        console.warn(
            console.safe(f"{len(done.unsigned)} without a signature: {_listed(done.unsigned)}")
        )
    size = file.stat().st_size
    if as_json:
        told = {"file": str(file), "base": header.identity.id, "size_bytes": size}
        console.show_json({**told, "adapters": done.names, "without": done.unsigned})
        return
    console.show(f"{file} ({size / 1e6:.1f} MB), {len(done.names)} signatures")
    console.say("it holds no text, but token counts and descriptions: as private as the data")


@signatures.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@_bank_option
@click.option("--base", help="Check also that this base made them.")
@click.option("--by-name", is_flag=True, help="Adapters of a name are the same, whatever bytes.")
@click.option("--force", is_flag=True, help="Replace signatures that differ.")
@_json_option
@console.common_options
def import_(
    file: Path,
    bank_path: Path,
    base: str | None,
    by_name: bool,
    force: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Give a bank's adapters the signatures of a file; nothing is embedded.

    An adapter is the same one if it was converted from the same files.
    """
    from edgelora.adapters.base import read_base
    from edgelora.bank import open_bank
    from edgelora.bank.sharing import import_signatures, read_signatures
    from edgelora.bases import resolve

    bank = open_bank(bank_path)
    shared = read_signatures(file)
    header = read_base(resolve(base)) if base else None
    with console.progress("importing signatures", len(shared.entries)) as advance:
        outcomes = import_signatures(
            bank, shared, base=header, by_name=by_name, force=force, progress=advance
        )
    unsigned = [record.name for record in bank.records() if not record.has_signature]
    if as_json:
        console.show_json({"outcomes": [vars(o) for o in outcomes], "without": unsigned})
    else:
        _show(outcomes)
    if unsigned:
        console.warn(console.safe(f"{len(unsigned)} without a signature: {_listed(unsigned)}"))
    raise SystemExit(int(not any(outcome.is_signed for outcome in outcomes)))


def _show(outcomes: Sequence[Imported]) -> None:
    from edgelora.bank.sharing import IMPORTED, KEPT, NAME_ONLY, REPLACED, SAME

    counts: dict[str, list[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.status, []).append(outcome.shared)
    for status, names in counts.items():
        quiet = status in (IMPORTED, REPLACED, SAME)
        console.show(f"{len(names)} {status}" + ("" if quiet else f": {_listed(names)}"))
    for outcome in outcomes:
        if outcome.status in (IMPORTED, REPLACED) and outcome.name != outcome.shared:
            console.show(f"    {outcome.shared} is called {outcome.name} here")
    if KEPT in counts:
        console.say("--force replaces those that differ")
    if NAME_ONLY in counts:
        console.say("--by-name takes adapters of one name for the same, though their files differ")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_N_LISTED])
    left = len(names) - _N_LISTED
    return shown if left <= 0 else f"{shown} and {left} more (--json lists all)"
