"""Opening a bank folder, and making one: bank.json says which format the folder has."""

from __future__ import annotations

import json
from pathlib import Path

from edgelora.bank.store import FOLDER, INDEX, LOCK, Bank
from edgelora.errors import BankError, NotFound
from edgelora.files import TEMPORARY_PREFIX, write_atomic

FORMAT = "edgelora-bank"
FORMAT_VERSION = 1
_MANIFEST = "bank.json"


def open_bank(path: Path, *, create: bool = False) -> Bank:
    """Open a bank folder; with `create`, make one where there is nothing yet.

    Raises:
        NotFound: no bank there (and `create` is false).
        BankError: a folder of something else, a damaged bank.json, or a newer format.
    """
    bank = Bank(path)
    manifest = path / _MANIFEST
    if not manifest.is_file():
        if not create:
            raise NotFound(
                f"{path}: not a bank (no {_MANIFEST})",
                hint="`edgelora bank add` makes one; --bank takes its folder.",
            )
        _create(bank)
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        kind, version = content["format"], content["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BankError(f"{manifest}: cannot be read as a bank's description ({error})") from error
    if kind != FORMAT:
        raise BankError(f"{manifest}: describes {kind!r}, not a bank")
    if version != FORMAT_VERSION:
        raise BankError(
            f"{path}: a bank of format {version}; this EdgeLoRA reads format {FORMAT_VERSION}",
            hint="Use the EdgeLoRA that made it, or add the adapters to a new bank.",
        )
    if not bank.folder.is_dir():  # git, for one, does not keep an empty folder
        if not create:
            raise BankError(f"{bank.folder}: missing", hint="`edgelora bank add` makes it.")
        bank.folder.mkdir(exist_ok=True)
    return bank


def _create(bank: Bank) -> None:
    """Make the folder and bank.json last; what a killed run left of it is taken over."""
    ours = (FOLDER, INDEX, LOCK, TEMPORARY_PREFIX, "README")
    try:
        bank.path.mkdir(parents=True, exist_ok=True)
        strange = [p.name for p in bank.path.iterdir() if not p.name.startswith(ours)]
        if strange and _MANIFEST not in strange:
            raise BankError(
                f"{bank.path}: a folder that is not a bank and not empty (holds {strange[0]})",
                hint="Choose an empty or new folder.",
            )
        bank.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BankError(f"{bank.path}: cannot be made ({error.strerror})") from error
    with bank.writing():
        content = {"format": FORMAT, "version": FORMAT_VERSION}
        write_atomic(bank.path / _MANIFEST, json.dumps(content, indent=1).encode() + b"\n")
