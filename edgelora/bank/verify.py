"""Every problem of a bank, found by reading every byte of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgelora.bank import seal
from edgelora.bank.calibration import (
    LOSSES_SUFFIX,
    PREFIX,
    calibration_files,
    calibration_path,
    parse_calibration,
    read_limited,
)
from edgelora.bank.names import check_name, find_clash
from edgelora.bank.records import BankRecord
from edgelora.bank.store import Bank
from edgelora.errors import EdgeLoRAError
from edgelora.files import TEMPORARY_PREFIX

if TYPE_CHECKING:
    from edgelora.adapters.base import Base


def verify(
    bank: Bank, base: Base | None = None, *, progress: Callable[[int], None] = lambda n: None
) -> list[str]:
    """Check each file against its recorded hash, its values, its signatures, and the folder.

    Args:
        base: check also that the adapters made for this base fit its tensors.
        progress: called with 1 after each adapter.

    Returns:
        One line for each problem; [] for a whole bank. Leftovers of a killed process are named,
        though they do no harm: the next `bank add` removes them.
    """
    listing = bank.listing()
    problems = [f"{file}: {reason}" for file, reason in listing.damaged]
    problems += [f"{file}: a signature without its adapter" for file in listing.orphans]
    problems += _leftovers(bank)
    problems += _calibration_problems(bank)
    names: list[str] = []
    layers: dict[str, int] = {}
    for record in listing.records:
        problems += [
            f"{record.path.name}: {p}" for p in _adapter_problems(bank, record, names, layers)
        ]
        problems += [f"{record.path.name}: {p}" for p in _misfits(bank, record, base)]
        names.append(record.name)
        progress(1)
    return problems


def _adapter_problems(
    bank: Bank, record: BankRecord, earlier: list[str], layers: dict[str, int]
) -> Iterator[str]:
    from edgelora.adapters.gguf_lora import find_nonfinite, open_lora

    try:
        check_name(record.name)
        lora = open_lora(record.path)
        if not seal.is_intact(record.path):
            yield "its bytes are not those that were written (content hash differs)"
        yield from find_nonfinite(lora)
        inside = lora.metadata.get("edgelora.name")
        if inside != record.name:
            yield f"renamed: it was added as {inside}"
        if record.base.id != record.base_id:
            yield f"its base's id {record.base_id} is not that of its parts, {record.base.id}"
    except (EdgeLoRAError, OSError) as error:
        yield str(error)
    clash = find_clash(record.name, earlier)
    if clash is not None:
        yield f"the same file as {clash} where case does not count"
    yield from _signature_problems(bank, record, layers)


def _signature_problems(bank: Bank, record: BankRecord, layers: dict[str, int]) -> Iterator[str]:
    """`layers`: by base, those of the first signature, which the others have to share."""
    for base_id in record.signatures:
        try:
            signature = bank.signature(record.name, base_id)
        except (EdgeLoRAError, OSError) as error:
            yield str(error)
            continue
        if signature.base_id != base_id:
            yield f"its signature for {base_id} was made by {signature.base_id}"
        common = layers.setdefault(base_id, signature.n_layers)
        if signature.n_layers != common:
            yield (
                f"its signature for {base_id} comes from {signature.n_layers or 'all'} layers, "
                f"others from {common or 'all'}: they cannot be compared"
            )


def _misfits(bank: Bank, record: BankRecord, base: Base | None) -> list[str]:
    if base is None or record.base_id != base.identity.id:
        return []
    try:
        bank.open(record.name, base)
    except EdgeLoRAError as error:
        return [str(error)]
    return []


def _calibration_problems(bank: Bank) -> Iterator[str]:
    """Damaged files only: one that other adapters have outdated does no harm."""
    for path in calibration_files(bank):
        try:
            stored = parse_calibration(read_limited(path), path.name)
            if path != calibration_path(bank, stored.base_id):
                yield f"{path.name}: is for the base {stored.base_id}"
        except EdgeLoRAError as error:
            yield error.what
    for path in sorted(bank.path.glob(f"{PREFIX}*{LOSSES_SUFFIX}")):
        from edgelora.bank.losses import parse_losses

        try:
            parse_losses(read_limited(path), path.name)
        except EdgeLoRAError as error:
            yield error.what


def _leftovers(bank: Bank) -> list[str]:
    found = [p for folder in (bank.path, bank.folder) for p in folder.glob(f"{TEMPORARY_PREFIX}*")]
    return [f"{path.name}: left by a process that was killed (or runs now)" for path in found]
