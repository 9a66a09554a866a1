"""Adding many adapters: each with its dataset's signature, going on past those that are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.bank.records import Facts
from edgelora.bank.store import Added, AlreadyThere, Bank
from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Dataset
from edgelora.errors import EdgeLoRAError

if TYPE_CHECKING:
    from edgelora.adapters.base import Base
    from edgelora.signature import Signature

ADDED, SIGNED, ALREADY_THERE, REFUSED = "added", "signed", "already there", "refused"

# A dataset, or a description of the task where there is none, to its signature.
Embed = Callable[[Dataset | str], "Signature"]


@dataclass(frozen=True)
class Request:
    """One folder to add, with what is known of it.

    Attributes:
        data: its training set, from which the signature is made; without it the description
            (`facts.description`) is embedded, and without both there is no signature.
    """

    folder: Path
    name: str | None = None
    data: Path | None = None
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        status: ADDED, SIGNED (it was there, and has a signature now), ALREADY_THERE or REFUSED.
        name: the adapter's name in the bank; empty if it is not there.
        reason: why it was refused; empty otherwise.
        notes: what a person should know.
        data: the dataset's format and number of examples; empty without a dataset.
    """

    folder: Path
    status: str
    name: str = ""
    reason: str = ""
    has_signature: bool = False
    notes: tuple[str, ...] = ()
    data: str = ""


def add_many(
    bank: Bank,
    base: Base,
    requests: Sequence[Request],
    *,
    embed: Embed,
    dtype: str = "f16",
    progress: Callable[[int], None] = lambda n: None,
    read_data: Callable[[Path], Dataset] = read_dataset,
    step: Callable[[str], None] = lambda stage: None,
) -> list[Outcome]:
    """Add each folder; a refused one does not stop the others. Run again, it finishes the work.

    Args:
        embed: called only for adapters that have no signature by this base yet.
        progress: called with 1 after each folder.
        step: see Bank.add; also "embedded" and "signed".

    Returns:
        One outcome for each request, in order.
    """
    outcomes = []
    for request in requests:
        try:
            outcomes.append(_add(bank, base, request, embed, dtype, read_data, step))
        except EdgeLoRAError as error:
            outcomes.append(Outcome(request.folder, REFUSED, reason=str(error)))
        progress(1)
    return outcomes


def _add(
    bank: Bank,
    base: Base,
    request: Request,
    embed: Embed,
    dtype: str,
    read_data: Callable[[Path], Dataset],
    step: Callable[[str], None],
) -> Outcome:
    # Read first: a wrong dataset is found before the adapter is in the bank without a signature.
    dataset = read_data(request.data) if request.data is not None else None
    what = dataset if dataset is not None else request.facts.description
    added = bank.add(
        request.folder, base, name=request.name, facts=request.facts, dtype=dtype, step=step
    )
    notes = [*_notes(added), *(dataset.warnings if dataset is not None else ())]
    status = ADDED if isinstance(added, Added) else ALREADY_THERE
    name, has_signature = added.record.name, added.record.has_signature
    reason = ""
    if what and not has_signature:
        try:
            signature = embed(what)
            step("embedded")
            bank.set_signature(name, signature)
            step("signed")
            has_signature = True
            status = SIGNED if status == ALREADY_THERE else status
        except EdgeLoRAError as error:
            status, reason = REFUSED, f"{name} is in the bank, its signature is not: {error}"
    data = _describe(dataset) if dataset is not None else ""
    return Outcome(request.folder, status, name, reason, has_signature, tuple(notes), data)


def _describe(dataset: Dataset) -> str:
    from edgelora.summarise import DEFAULT_N_EMBEDDED

    n = len(dataset.examples)
    sampled = f", {DEFAULT_N_EMBEDDED} of them embedded" if n > DEFAULT_N_EMBEDDED else ""
    return f"{dataset.format}, {n} examples{sampled}"


def _notes(added: Added | AlreadyThere) -> tuple[str, ...]:
    return added.warnings if isinstance(added, Added) else added.kept
