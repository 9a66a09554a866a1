"""Adding many adapters: each with its dataset's signature, going on past those that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
# Calls it for many, here or elsewhere; keys come back with what was made, in whatever order.
Keyed = tuple[int, Dataset | str]
Embedded = tuple[int, "Signature | EdgeLoRAError"]
Each = Callable[[Embed, Iterable[Keyed]], Iterator[Embedded]]


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


def one_by_one(embed: Embed, keyed: Iterable[Keyed]) -> Iterator[Embedded]:
    """Each in its turn, in this process."""
    for key, what in keyed:
        try:
            signature: Signature | EdgeLoRAError = embed(what)
        except EdgeLoRAError as error:
            signature = error
        yield key, signature


def add_many(
    bank: Bank,
    base: Base,
    requests: Sequence[Request],
    *,
    embed: Embed,
    each: Each = one_by_one,
    dtype: str = "f16",
    progress: Callable[[int], None] = lambda n: None,
    read_data: Callable[[Path], Dataset] = read_dataset,
    step: Callable[[str], None] = lambda stage: None,
) -> list[Outcome]:
    """Add each folder; a refused one does not stop the others. Run again, it finishes the work.

    Args:
        embed: called only for adapters that have no signature by this base yet.
        each: where it is called: here, or on the workers of a scheduler (edgelora.bank.remote).
            Only this process writes the bank, each signature as soon as it is there.
        progress: called with 1 after each folder.
        step: see Bank.add; also "embedded" and "signed".

    Returns:
        One outcome for each request, in order.
    """
    adding = _Adding(bank, base, requests, dtype, read_data, step, progress)
    while adding.waiting:
        for i, signature in each(embed, adding.unsigned()):
            adding.sign(i, signature)
    return [adding.outcomes[i] for i in range(len(requests))]


@dataclass
class _Adding:
    """Requests on their way: those that wait, and what has become of the others."""

    bank: Bank
    base: Base
    requests: Sequence[Request]
    dtype: str
    read_data: Callable[[Path], Dataset]
    step: Callable[[str], None]
    progress: Callable[[int], None]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    embedding: set[str] = field(default_factory=set)
    waiting: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = list(range(len(self.requests)))

    def unsigned(self) -> Iterator[Keyed]:
        """Convert one request after the other; those that want a signature come out."""
        waiting, self.waiting = self.waiting, []
        for i in waiting:
            try:
                outcome, what = self._convert(self.requests[i])
            except EdgeLoRAError as error:
                outcome, what = Outcome(self.requests[i].folder, REFUSED, reason=str(error)), None
            if outcome.name in self.embedding:  # the same bytes twice: that one goes first
                self.waiting.append(i)
                continue
            self.outcomes[i] = outcome
            if what and not outcome.has_signature:
                self.embedding.add(outcome.name)
                yield i, what
            else:
                self.progress(1)

    def sign(self, i: int, signature: Signature | EdgeLoRAError) -> None:
        """Keep the signature of a request's data, or the reason why there is none."""
        outcome = self.outcomes[i]
        self.embedding.discard(outcome.name)
        try:
            if isinstance(signature, EdgeLoRAError):
                raise signature
            self.step("embedded")
            self.bank.set_signature(outcome.name, signature)
            self.step("signed")
            status = SIGNED if outcome.status == ALREADY_THERE else outcome.status
            self.outcomes[i] = replace(outcome, status=status, has_signature=True)
        except EdgeLoRAError as error:
            reason = f"{outcome.name} is in the bank, its signature is not: {error}"
            self.outcomes[i] = replace(outcome, status=REFUSED, reason=reason)
        self.progress(1)

    def _convert(self, request: Request) -> tuple[Outcome, Dataset | str | None]:
        # Read first: a wrong dataset is found before the adapter is in the bank without signature.
        dataset = self.read_data(request.data) if request.data is not None else None
        added = self.bank.add(
            request.folder,
            self.base,
            name=request.name,
            facts=request.facts,
            dtype=self.dtype,
            step=self.step,
        )
        outcome = Outcome(
            request.folder,
            ADDED if isinstance(added, Added) else ALREADY_THERE,
            added.record.name,
            has_signature=added.record.has_signature,
            notes=(*_notes(added), *(dataset.warnings if dataset is not None else ())),
            data=_describe(dataset) if dataset is not None else "",
        )
        return outcome, dataset if dataset is not None else request.facts.description


def _describe(dataset: Dataset) -> str:
    from edgelora.summarise import DEFAULT_N_EMBEDDED

    n = len(dataset.examples)
    sampled = f", {DEFAULT_N_EMBEDDED} of them embedded" if n > DEFAULT_N_EMBEDDED else ""
    return f"{dataset.format}, {n} examples{sampled}"


def _notes(added: Added | AlreadyThere) -> tuple[str, ...]:
    return added.warnings if isinstance(added, Added) else added.kept
