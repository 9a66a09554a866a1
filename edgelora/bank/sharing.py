"""The signatures of a bank in one file: embeddings are computed once, by one person.

A safetensors file with one uint8 tensor for each signature, whose bytes are those of
signature.to_bytes, and one entry of metadata that says what they belong to. No adapter is in it,
and no text but descriptions; token counts tell which words a dataset uses (see edgelora.signature).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.adapters.base import BaseIdentity
from edgelora.bank.records import BankRecord, signature_path
from edgelora.bank.store import Bank
from edgelora.errors import BankError, IncompatibleAdapter, InvalidFile, NotFound
from edgelora.files import write_atomic
from edgelora.signature import Signature, from_bytes, to_bytes
from edgelora.summarise import embedding_name

if TYPE_CHECKING:
    from edgelora.adapters.base import Base

FORMAT_VERSION = 1
MAX_SIGNATURES = 100_000
MAX_SIGNATURE_BYTES = 8 << 20
KEY = "edgelora.signatures"
_PARTS = ("architecture", "shapes", "tokenizer", "norms")
_MALFORMED = (KeyError, TypeError, ValueError, RecursionError)

IMPORTED, REPLACED, SAME = "imported", "replaced", "already there"
KEPT, NAME_ONLY = "has another signature", "has the name only"
OTHER_BASE, ABSENT = "for another base", "not in the bank"


@dataclass(frozen=True, eq=False)
class SharedSignature:
    """One signature of a file.

    Attributes:
        name: of its adapter where it was exported.
        source_sha256: of the files that the adapter was converted from.
    """

    name: str
    source_sha256: str
    signature: Signature


@dataclass(frozen=True, eq=False)
class SharedSignatures:
    """What a file holds: signatures that one base made in one way."""

    base: BaseIdentity
    entries: tuple[SharedSignature, ...]


@dataclass(frozen=True)
class Exported:
    """What was written, and the adapters for this base that have no signature."""

    path: Path
    names: tuple[str, ...]
    unsigned: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """What became of one signature.

    Attributes:
        shared: the adapter's name in the file.
        name: its name in the bank; "" where it is not there.
        status: IMPORTED, REPLACED, SAME (nothing to do), KEPT (the bank's own differs and stays),
            NAME_ONLY (the bank's adapter of that name was made from other files), OTHER_BASE (the
            same adapter, converted for another base) or ABSENT.
    """

    shared: str
    name: str
    status: str

    @property
    def is_signed(self) -> bool:
        """Whether the adapter has a signature now."""
        return self.status in (IMPORTED, REPLACED, SAME, KEPT)


def export_signatures(
    bank: Bank,
    base: Base,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[int], None] = lambda n_adapters: None,
) -> Exported:
    """Write all signatures made by `base` to one file; the same bank gives the same bytes.

    Args:
        progress: called with 1 after each adapter.

    Raises:
        BankError: no adapter of the bank has one.
        InvalidFile: a signature is damaged.
        AlreadyExists: `out` exists and `force` is false.
    """
    from safetensors.numpy import save

    identity = base.identity
    records = [record for record in bank.records() if record.base_id == identity.id]
    signed = [record for record in records if record.has_signature]
    if not signed:
        raise BankError(
            f"{bank.path}: no adapter has a signature made by {identity.describe()}",
            hint="Make them: edgelora bank add ... --data-glob.",
        )
    tensors, layers = {}, set()
    for number, record in enumerate(signed):
        signature = bank.signature(record.name, identity.id)
        tensors[_tensor(number)] = np.frombuffer(to_bytes(signature), np.uint8)
        layers.add(signature.n_layers)
        progress(1)
    n_layers = _only(bank, layers)
    facts = {
        "version": FORMAT_VERSION,
        "base": {part: getattr(identity, part) for part in _PARTS},
        "embedding": embedding_name(n_layers),
        "adapters": [[record.name, record.source_sha256] for record in signed],
    } | ({"n_layers": n_layers} if n_layers else {})
    _refuse_unreadable(bank, facts, set(tensors))
    encoded = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    write_atomic(out, save(tensors, metadata={KEY: encoded}), force=force)
    return Exported(
        out,
        tuple(record.name for record in signed),
        tuple(record.name for record in records if not record.has_signature),
    )


def _only(bank: Bank, layers: set[int]) -> int:
    if len(layers) > 1:
        raise BankError(
            f"{bank.path}: its signatures come from different layers of the base "
            f"({', '.join(str(n or 'all') for n in sorted(layers))}): one file holds one kind",
            hint=f"See which: edgelora bank verify --bank {bank.path}",
        )
    return layers.pop()


def _refuse_unreadable(bank: Bank, facts: Mapping[str, Any], tensors: set[str]) -> None:
    """What nobody could import is not written."""
    try:
        _check_facts(facts, tensors)
    except _MALFORMED as error:
        raise BankError(
            f"{bank.path}: its signatures cannot be exported ({error})",
            hint=f"See what is wrong: edgelora bank verify --bank {bank.path}",
        ) from error


def read_signatures(path: Path) -> SharedSignatures:
    """Read what `export_signatures` wrote, trusting nothing in it.

    Raises:
        NotFound: no such file.
        InvalidFile: not such a file, of another version, embedded in another way, or with
            signatures that are damaged or of another base; every problem is listed.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {})[KEY])
            identity, adapters = _check_facts(facts, set(file.keys()))
            entries, problems = _read_entries(file, adapters, identity)
            problems += _of_other_layers(entries, _layers_of(facts))
    except SafetensorError as error:
        raise _invalid(path, [f"not a safetensors file: {error}"]) from error
    except _MALFORMED as error:
        raise _invalid(path, [f"{type(error).__name__}: {error}"]) from error
    problems += _uneven(entries)
    if problems:
        raise _invalid(path, problems)
    return SharedSignatures(identity, tuple(entries))


def import_signatures(
    bank: Bank,
    shared: SharedSignatures,
    *,
    base: Base | None = None,
    by_name: bool = False,
    force: bool = False,
    progress: Callable[[int], None] = lambda n_adapters: None,
) -> list[Imported]:
    """Give each adapter of the bank its signature; run again, it only does what is missing.

    An adapter is the same one if it was converted from the same bytes.

    Args:
        base: check also that the signatures were made by this base.
        by_name: take an adapter of the same name, made from other files, for the same one.
        force: replace signatures that the bank has already.
        progress: called with 1 after each signature.

    Raises:
        IncompatibleAdapter: the signatures do not fit `base`, or those that the bank has.
        BankError: a damaged bank, a full disk, a lock that stays held.
    """
    records = bank.records()
    problems = _misfits(bank, records, shared, base)
    if problems:
        raise IncompatibleAdapter("signatures that do not fit this bank", problems=problems)
    outcomes = []
    for entry in shared.entries:
        found = _match(records, entry, shared.base.id, by_name)
        if isinstance(found, BankRecord):
            found = _import(bank, found, entry, force)
        outcomes.append(found)
        progress(1)
    return outcomes


def _match(
    records: Sequence[BankRecord], entry: SharedSignature, base_id: str, by_name: bool
) -> BankRecord | Imported:
    """The adapter that a signature belongs to, or why there is none."""
    same = [record for record in records if record.source_sha256 == entry.source_sha256]
    namesakes = [record for record in records if record.name == entry.name]
    ours = [record for record in same if record.base_id == base_id]
    named = [record for record in namesakes if record.base_id == base_id]
    if ours:
        return ours[0]
    if named:
        return named[0] if by_name else Imported(entry.name, named[0].name, NAME_ONLY)
    return Imported(entry.name, "", OTHER_BASE if same or namesakes else ABSENT)


def _import(bank: Bank, record: BankRecord, entry: SharedSignature, force: bool) -> Imported:
    status = IMPORTED
    if record.has_signature:
        path = signature_path(record.path, record.base_id)
        if path.read_bytes() == to_bytes(entry.signature):
            return Imported(entry.name, record.name, SAME)
        if not force:
            return Imported(entry.name, record.name, KEPT)
        status = REPLACED
    bank.set_signature(record.name, entry.signature)
    return Imported(entry.name, record.name, status)


def _misfits(
    bank: Bank, records: Sequence[BankRecord], shared: SharedSignatures, base: Base | None
) -> list[str]:
    """Another base than the one given, or sizes or layers other than the bank's own signatures."""
    if not shared.entries:
        return []
    given = shared.entries[0].signature
    problems = []
    if base is not None and base.identity != shared.base:
        problems += [
            f"the signatures' base: {shared.base.describe()}",
            f"the base in use:      {base.identity.describe()}",
        ]
    elif base is not None and (given.d, given.n_vocab) != (base.n_embd, base.n_vocab):
        problems.append(
            f"{given.d} wide over {given.n_vocab} tokens, the base is {base.n_embd} wide over "
            f"{base.n_vocab}"
        )
    signed = next((r for r in records if r.base_id == shared.base.id and r.has_signature), None)
    own = bank.signature(signed.name, signed.base_id) if signed else given
    if (own.d, own.n_vocab) != (given.d, given.n_vocab):
        problems.append(
            f"{given.d} wide over {given.n_vocab} tokens, the bank's own are {own.d} wide over "
            f"{own.n_vocab}"
        )
    if own.n_layers != given.n_layers:
        problems.append(
            f"from {given.n_layers or 'all'} layers of the base, the bank's own from "
            f"{own.n_layers or 'all'}"
        )
    return problems


def _check_facts(
    facts: Mapping[str, Any], tensors: set[str]
) -> tuple[BaseIdentity, list[tuple[str, str]]]:
    """The base and the adapters; ValueError, KeyError or TypeError where they are not sound."""
    if facts["version"] != FORMAT_VERSION:
        raise ValueError(f"format version {facts['version']}; this program reads {FORMAT_VERSION}")
    n_layers = _layers_of(facts)
    if facts["embedding"] != embedding_name(n_layers):
        raise ValueError(
            f"made by the embedding {str(facts['embedding'])[:100]!r}; this program's is "
            f"{embedding_name(n_layers)!r}, and the two cannot be compared"
        )
    parts = [facts["base"][part] for part in _PARTS]
    if not all(isinstance(part, str) and len(part) <= 100 for part in parts):
        raise TypeError("the base's identity is not made of short texts")
    adapters = [(name, sha256) for name, sha256 in facts["adapters"]]
    if not 1 <= len(adapters) <= MAX_SIGNATURES:
        raise ValueError(f"{len(adapters)} adapters; from 1 to {MAX_SIGNATURES} are read")
    for name, sha256 in adapters:
        if not isinstance(name, str) or not re.fullmatch(r"[0-9a-f]{64}", str(sha256)):
            raise ValueError(f"the adapter {str(name)[:100]!r} has no name or no sha256")
    if len({sha256 for _, sha256 in adapters}) < len(adapters):
        raise ValueError("two signatures for one adapter")
    if tensors != {_tensor(number) for number in range(len(adapters))}:
        raise ValueError(f"{len(tensors)} tensors for {len(adapters)} adapters")
    return BaseIdentity(*parts), adapters


def _read_entries(
    file: Any, adapters: Sequence[tuple[str, str]], identity: BaseIdentity
) -> tuple[list[SharedSignature], list[str]]:
    entries, problems = [], []
    for number, (name, sha256) in enumerate(adapters):
        lying = file.get_slice(_tensor(number))
        shape, dtype = lying.get_shape(), lying.get_dtype()
        if dtype != "U8" or len(shape) != 1 or shape[0] > MAX_SIGNATURE_BYTES:
            problems.append(f"{name}: a tensor of type {dtype} and shape {shape}")
            continue
        try:
            signature = from_bytes(file.get_tensor(_tensor(number)).tobytes(), name)
        except InvalidFile as error:
            problems.append("; ".join((error.what, *error.problems)))
            continue
        if signature.base_id != identity.id:
            problems.append(f"{name}: made by the base {signature.base_id}, not {identity.id}")
        entries.append(SharedSignature(name, sha256, signature))
    return entries, problems


def _uneven(entries: Sequence[SharedSignature]) -> list[str]:
    """Signatures of another size than the first has: one base makes them all alike."""
    sizes = [(entry.signature.d, entry.signature.n_vocab) for entry in entries]
    return [
        f"{entry.name}: {size[0]} wide over {size[1]} tokens, {entries[0].name} is {sizes[0][0]} "
        f"over {sizes[0][1]}"
        for entry, size in zip(entries, sizes, strict=True)
        if size != sizes[0]
    ]


def _of_other_layers(entries: Sequence[SharedSignature], n_layers: int) -> list[str]:
    return [
        f"{entry.name}: from {entry.signature.n_layers or 'all'} layers, the file says "
        f"{n_layers or 'all'}"
        for entry in entries
        if entry.signature.n_layers != n_layers
    ]


def _layers_of(facts: Mapping[str, Any]) -> int:
    """0 for all layers, as in files that were written before there was a choice."""
    n_layers = facts.get("n_layers", 0)
    if type(n_layers) is not int:
        raise TypeError("n_layers is not a whole number")
    return n_layers


def _invalid(path: Path, problems: Sequence[str]) -> InvalidFile:
    shown = list(problems[:20])
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return InvalidFile(
        f"{path}: not a sound file of signatures",
        problems=shown,
        hint="Export it again: edgelora bank signatures export FILE --bank BANK --base BASE.",
    )


def _tensor(number: int) -> str:
    return f"{number:06}"
