"""Bank: a folder of adapters that never change, each whole or absent whatever interrupts a write.

    bank.json                                        the format's version
    adapters/<name>.gguf                             one GGUF LoRA, with all that is known of it
    adapters/<name>.<base id>.signature.safetensors  the signature of its dataset, by that base
    index.sqlite                                     a cache of the headers (edgelora.bank.index)
    .lock                                            held by whoever writes

Everything that writes holds the lock, and each file appears by one rename. So a temporary file seen
under the lock was left by a killed process: the next writer sweeps it. What is NOT covered: network
file systems without working locks.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.bank import seal
from edgelora.bank.index import Listing, delete_index, list_adapters
from edgelora.bank.names import check_name, derive_name, find_clash
from edgelora.bank.records import (
    SIGNATURE_SUFFIX,
    SUFFIX,
    BankRecord,
    Facts,
    read_record,
    signature_path,
)
from edgelora.errors import AlreadyExists, BankError, InvalidFile, NotFound
from edgelora.files import TEMPORARY_PREFIX, locked, publish

if TYPE_CHECKING:
    from edgelora.adapters.base import Base
    from edgelora.adapters.gguf_lora import LoraFile
    from edgelora.adapters.source import SourceAdapter
    from edgelora.signature import Signature

LOCK_TIMEOUT_S = 600.0
FOLDER = "adapters"
INDEX = "index.sqlite"
LOCK = ".lock"

Step = Callable[[str], None]


@dataclass(frozen=True)
class Added:
    """A new adapter, and what a person should know of its conversion."""

    record: BankRecord
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class AlreadyThere:
    """The same bytes, for the same base, were added before; nothing changed.

    Attributes:
        kept: what was asked for and differs from the record, which stays as it is.
    """

    record: BankRecord
    kept: tuple[str, ...]


class Bank:
    """An open bank. It holds no file open; any number of processes may share one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path / FOLDER

    def listing(self) -> Listing:
        """All that lies in the bank, damaged files too, through the index.

        Raises:
            BankError: the folder cannot be listed.
        """
        try:
            return list_adapters(self.folder, self.path / INDEX)
        except OSError as error:
            raise BankError(f"{self.folder}: {error.strerror}") from error

    def records(self) -> list[BankRecord]:
        """Every adapter, by name.

        Raises:
            BankError: some adapter is damaged: a bank is used whole or repaired, never in part.
        """
        listing = self.listing()
        if listing.damaged:
            raise BankError(
                f"{self.path}: some adapters cannot be read",
                problems=[reason for _, reason in listing.damaged],
                hint=f"Remove them (edgelora bank rm NAME --bank {self.path}) and add them again.",
            )
        return list(listing.records)

    def record(self, name: str) -> BankRecord:
        """One adapter.

        Raises:
            NotFound: there is none of that name (close ones are named).
            BankError: it is damaged.
        """
        listing = self.listing()
        for record in listing.records:
            if record.name == name:
                return record
        for file, reason in listing.damaged:
            if file == name + SUFFIX:
                raise BankError(reason, hint=f"edgelora bank rm {name}, then add it again.")
        raise self._not_found(name, listing)

    def open(self, name: str, base: Base | None = None) -> LoraFile:
        """One adapter's file, checked; with `base`, also that it fits that base.

        Raises:
            NotFound, InvalidFile, BankError: absent or damaged.
            IncompatibleAdapter: made for another base (both identities are shown), or it misfits.
        """
        from edgelora.adapters.gguf_lora import check, open_lora
        from edgelora.errors import IncompatibleAdapter

        record = self.record(name)
        if base is not None:
            record.require(base.identity)
        lora = open_lora(record.path)
        problems = check(lora, base) if base is not None else []
        if problems:
            raise IncompatibleAdapter(f"{record.path}: does not fit the base", problems=problems)
        return lora

    def add(
        self,
        folder: Path,
        base: Base,
        *,
        name: str | None = None,
        facts: Facts | None = None,
        dtype: str = "f16",
        step: Step = lambda stage: None,
    ) -> Added | AlreadyThere:
        """Convert a PEFT folder and keep it; adding the same bytes again changes nothing.

        Args:
            name: the folder's (or its parent's, for a folder called `adapter`) if None.
            step: called after each stage: "read", "locked", "converted", "published".

        Raises:
            InvalidFile, UnsupportedFile, IncompatibleAdapter: everything wrong with the folder.
            TemplateError: the base has no chat template and `facts` none either.
            AlreadyExists: the name belongs to an adapter made from other bytes.
            BankError: a name that is not safe everywhere, a full disk, a lock that stays held.
        """
        chosen = name if name is not None else derive_name(folder)
        check_name(chosen)
        facts = with_template(facts or Facts(), base)
        source = _read(folder, base)
        step("read")
        with self.writing():
            step("locked")
            listing = self.listing()
            for record in listing.records:
                if (record.source_sha256, record.base_id) == (
                    source.source_sha256,
                    base.identity.id,
                ):
                    return AlreadyThere(record, _kept(record, name, facts, dtype))
            self._refuse_clash(chosen, listing)
            for stale in self._signatures(chosen):  # of a file that was removed by hand
                stale.unlink()
            target = self.folder / (chosen + SUFFIX)
            with publish(target) as temporary:
                _convert(source, base, temporary, chosen, facts, dtype)
                step("converted")
            step("published")
        return Added(read_record(target), source.warnings)

    def signature(self, name: str, base_id: str) -> Signature:
        """The signature of an adapter's dataset, made by the base `base_id`.

        Raises:
            NotFound: there is none.
            InvalidFile: it is damaged.
        """
        from edgelora.signature import from_bytes

        path = self._signature_path(name, base_id)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(
                f"{name}: no signature made by the base {base_id}",
                hint="Add the adapter again with --data, --data-glob or --text.",
            ) from error
        return from_bytes(data, str(path))

    def set_signature(self, name: str, signature: Signature) -> None:
        """Keep the signature of an adapter's dataset; replaces one that the same base made.

        Raises:
            NotFound: no such adapter.
            BankError: a full disk, a lock that stays held.
        """
        from edgelora.signature import from_bytes, to_bytes

        with self.writing():
            self._require_file(name)
            with publish(self._signature_path(name, signature.base_id), force=True) as temporary:
                temporary.write_bytes(to_bytes(signature))
                from_bytes(temporary.read_bytes())

    def remove(self, name: str) -> None:
        """Delete an adapter (a damaged one too) and its signatures.

        Raises:
            NotFound: no such adapter.
        """
        with self.writing():
            path = self._require_file(name)
            # Signatures first: killed in between, the same command run again finishes.
            for signature in self._signatures(name):
                signature.unlink()
            path.unlink()

    def export(self, name: str, folder: Path, base: Base) -> None:
        """Write an adapter as a PEFT folder.

        Raises:
            NotFound, InvalidFile, IncompatibleAdapter: see open().
            AlreadyExists: the folder holds an adapter already.
            BankError: the folder cannot be written.
        """
        from edgelora.adapters.peft import write_peft

        lora = self.open(name, base)
        try:
            write_peft(lora, base, folder)
        except OSError as error:
            raise BankError(f"{folder}: cannot be written ({error.strerror or error})") from error

    def reindex(self) -> Listing:
        """Delete the index and read every adapter's header anew."""
        with self.writing():
            delete_index(self.path / INDEX)
            return self.listing()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the bank's lock, with what killed writers left swept away.

        Raises:
            BankError: the lock stays held, or (an OSError inside) a full or read-only disk.
        """
        try:
            with locked(self.path / LOCK, timeout_s=LOCK_TIMEOUT_S):
                for folder in (self.path, self.folder):
                    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
                        leftover.unlink(missing_ok=True)
                yield
        except OSError as error:
            raise BankError(
                f"{self.path}: {error.strerror or error} ({error.filename or 'while writing'})",
                hint="The bank is as it was. Run the same command again once that is mended.",
            ) from error

    def _require_file(self, name: str) -> Path:
        # The names alone: a listing for each of 500 signatures would take half a minute.
        if name.startswith(".") or name + SUFFIX not in os.listdir(self.folder):
            raise self._not_found(name, self.listing())
        return self.folder / (name + SUFFIX)

    def _refuse_clash(self, name: str, listing: Listing) -> None:
        taken = [record.name for record in listing.records]
        taken += [file.removesuffix(SUFFIX) for file, _ in listing.damaged]
        clash = find_clash(name, taken)
        if clash is not None:
            same = "" if clash == name else f" (as {clash}: case does not count)"
            raise AlreadyExists(
                f"{name}: the bank has an adapter of that name{same}, made from other bytes",
                hint=f"Choose another name with --name, or remove it: edgelora bank rm {clash}",
            )

    def _signature_path(self, name: str, base_id: str) -> Path:
        return signature_path(self.folder / (name + SUFFIX), base_id)

    def _signatures(self, name: str) -> list[Path]:
        found = self.folder.glob(f"*{SIGNATURE_SUFFIX}")
        return [
            p for p in found if p.name.removesuffix(SIGNATURE_SUFFIX).rpartition(".")[0] == name
        ]

    def _not_found(self, name: str, listing: Listing) -> NotFound:
        names = [record.name for record in listing.records]
        close = difflib.get_close_matches(name, names, n=3)
        return NotFound(
            f"{name}: no such adapter in {self.path}",
            hint=f"Did you mean {' or '.join(close)}?" if close else "See `edgelora bank ls`.",
        )


def with_template(facts: Facts, base: Base) -> Facts:
    """The facts with the template as adapters record it; None stays, if the base has its own.

    Raises:
        TemplateError: not a template, or none given for a base without one.
    """
    from edgelora.datasets.template import open_template

    template = open_template(base.chat_template, facts.template, "", "", ())
    return facts if facts.template is None else replace(facts, template=template.key)


def _read(folder: Path, base: Base) -> SourceAdapter:
    from edgelora.adapters.peft import read_adapter

    try:
        return read_adapter(folder, base)
    except OSError as error:
        raise InvalidFile(f"{folder}: cannot be read ({error.strerror or error})") from error


def _kept(record: BankRecord, name: str | None, facts: Facts, dtype: str) -> tuple[str, ...]:
    asked = {"name": name or record.name, "dtype": dtype, **dict(facts.items())}
    return tuple(
        f"{key} stays {getattr(record, key)!r}, not {value!r}"
        for key, value in asked.items()
        if getattr(record, key) != value
    )


def _convert(
    source: SourceAdapter, base: Base, temporary: Path, name: str, facts: Facts, dtype: str
) -> None:
    """Write and seal the adapter's file."""
    from edgelora.adapters.peft import convert_source

    metadata = {"edgelora.name": name, seal.KEY: seal.PLACEHOLDER, "edgelora.template": "chat"}
    metadata |= {f"edgelora.{key}": value for key, value in facts.items()}
    convert_source(source, base, temporary, dtype=dtype, metadata=metadata)
    seal.seal(temporary)
