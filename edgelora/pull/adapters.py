"""Adapters from the Hub into a bank: fetched, converted, signed one by one, the source dropped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from edgelora.bank.adding import ALREADY_THERE, REFUSED, SIGNED, Embed, Outcome, Request, add_many
from edgelora.bank.names import check_name
from edgelora.bank.records import BankRecord, Facts
from edgelora.bank.store import Bank
from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Dataset
from edgelora.errors import EdgeLoRAError, HubError, HubUnreachable
from edgelora.files import locked
from edgelora.hub.download import fetch
from edgelora.hub.repository import DATASET, Repository, RepositoryFile, read_repository

if TYPE_CHECKING:
    from edgelora.adapters.base import Base

STAGING = "downloads"
LOCK = ".lock-pull"
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_LOCK_TIMEOUT_S = 1.0
# Where the first ones are all refused, the rest would be too: each costs its download.
_N_REFUSED_AT_FIRST = 3


@dataclass(frozen=True)
class Wanted:
    """An adapter of the Hub.

    Attributes:
        name: in the bank.
        repository: `org/name` of a PEFT (or mlx-lm) adapter.
        dataset: `org/name` of what it was trained on, with a train split as parquet.
        facts: what is known of it; where they name no licence, its card's is taken.
    """

    name: str
    repository: str
    dataset: str | None = None
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True)
class Listener:
    """Who is told what happens.

    Attributes:
        stage: (adapter, what is done with it now).
        transfer: (file, bytes that have come, bytes in all).
        done: called after each adapter.
    """

    stage: Callable[[str, str], None] = lambda name, stage: None
    transfer: Callable[[str, int, int], None] = lambda file, done, total: None
    done: Callable[[], None] = lambda: None
    warn: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Pulled:
    """What became of each adapter, in order.

    Attributes:
        stopped: why the adapters after these were not fetched; None if all were tried.
    """

    outcomes: tuple[Outcome, ...]
    stopped: EdgeLoRAError | None = None


def pull_adapters(
    bank: Bank,
    base: Base,
    wanted: Sequence[Wanted],
    *,
    embed: Embed,
    with_signatures: bool = True,
    dtype: str = "f16",
    read_data: Callable[[Path], Dataset] = read_dataset,
    listener: Listener | None = None,
) -> Pulled:
    """Bring adapters into a bank; one that is there already is not asked for again.

    Each is fetched into the bank's folder `downloads`, converted, and removed there. Stopped at any
    point, the same call goes on: with the adapter, and within the file, where it stopped. One that
    is refused does not stop the others; a Hub that does not answer does, and so does a collection
    of which the first three are refused.

    Args:
        embed: from a dataset or a description to a signature.
        with_signatures: fetch datasets and make signatures; without, another call can later.
        read_data: how datasets are read.

    Raises:
        BankError: a name that cannot be a file's; another process is pulling into this bank.
    """
    for one in wanted:
        check_name(one.name)
    told = listener or Listener()
    outcomes: list[Outcome] = []
    stopped: EdgeLoRAError | None = None
    staging = bank.path / STAGING
    with locked(bank.path / LOCK, timeout_s=_LOCK_TIMEOUT_S):
        known = {record.name: record for record in bank.listing().records}
        for one in wanted:
            one = one if with_signatures else replace(one, dataset=None)
            puller = _Puller(bank, base, one, staging / one.name, told)
            try:
                outcome = puller.pull(known.get(one.name), embed, dtype, read_data)
            except HubUnreachable as error:  # what has come stays in `downloads`
                return Pulled(tuple(outcomes), stopped=error)
            except EdgeLoRAError as error:
                outcome = Outcome(Path(one.repository), REFUSED, reason=str(error))
            shutil.rmtree(staging / one.name, ignore_errors=True)
            outcomes.append(outcome)
            told.done()
            if stopped := _stopped(outcomes, len(wanted)):
                break
        shutil.rmtree(staging, ignore_errors=True)
    return Pulled(tuple(outcomes), stopped)


def _stopped(outcomes: Sequence[Outcome], n_wanted: int) -> HubError | None:
    refused = all(outcome.status == REFUSED for outcome in outcomes)
    if not refused or len(outcomes) != _N_REFUSED_AT_FIRST or len(outcomes) == n_wanted:
        return None
    return HubError(
        f"stopped: the first {len(outcomes)} of {n_wanted} adapters were all refused",
        hint="Mend what their lines above say (is it the right --base?), then run it again.",
    )


@dataclass(frozen=True)
class _Puller:
    """One adapter on its way."""

    bank: Bank
    base: Base
    wanted: Wanted
    folder: Path
    listener: Listener

    def pull(
        self,
        record: BankRecord | None,
        embed: Embed,
        dtype: str,
        read_data: Callable[[Path], Dataset],
    ) -> Outcome:
        """Do what is missing."""
        name, wanted = self.wanted.name, self.wanted
        if record is not None and self._is_it(record):
            if record.has_signature or wanted.dataset is None:
                told = (Path(wanted.repository), ALREADY_THERE, name)
                return Outcome(*told, has_signature=record.has_signature)
            return self._sign(self._fetch_dataset(wanted.dataset), embed, read_data)
        # The dataset first: without it the adapter would be in the bank without a signature.
        data = self._fetch_dataset(wanted.dataset) if wanted.dataset else None
        folder, facts = self._fetch_adapter()
        self.listener.stage(name, "converting")
        (outcome,) = add_many(
            self.bank,
            self.base,
            [Request(folder, name, data, facts)],
            embed=self._telling(embed),
            dtype=dtype,
            read_data=read_data,
        )
        return replace(outcome, folder=Path(wanted.repository))

    def _is_it(self, record: BankRecord) -> bool:
        same_source = record.origin.partition("@")[0] == self.wanted.repository
        return same_source and record.base_id == self.base.identity.id

    def _sign(self, data: Path, embed: Embed, read_data: Callable[[Path], Dataset]) -> Outcome:
        dataset = read_data(data)
        signature = self._telling(embed)(dataset)
        self.bank.set_signature(self.wanted.name, signature)
        where = (Path(self.wanted.repository), SIGNED, self.wanted.name)
        return Outcome(*where, has_signature=True, notes=dataset.warnings)

    def _telling(self, embed: Embed) -> Embed:
        def told(what: Dataset | str) -> object:
            self.listener.stage(self.wanted.name, "embedding")
            return embed(what)

        return told  # type: ignore[return-value]

    def _fetch_dataset(self, name: str) -> Path:
        repository = read_repository(name, DATASET)
        file = train_file(repository)
        return self._fetch(repository, file, self.folder / "train.parquet")

    def _fetch_adapter(self) -> tuple[Path, Facts]:
        repository = read_repository(self.wanted.repository)
        folder = self.folder / "adapter"
        for file in adapter_files(repository):
            self._fetch(repository, file, folder / file.path)
        facts = replace(self.wanted.facts, origin=repository.origin)
        return folder, replace(facts, licence=facts.licence or repository.licence or None)

    def _fetch(self, repository: Repository, file: RepositoryFile, target: Path) -> Path:
        self.listener.stage(self.wanted.name, "fetching")
        label = f"{repository.id.partition('/')[2]}/{PurePosixPath(file.path).name}"
        return fetch(
            repository,
            file,
            target,
            progress=lambda done, total: self.listener.transfer(label, done, total),
            warn=self.listener.warn,
        )


def adapter_files(repository: Repository) -> tuple[RepositoryFile, RepositoryFile]:
    """The config and the weights of an adapter's repository; all else stays on the Hub.

    Raises:
        HubError: one is missing, or the weights are a pickle; what there is, is listed.
    """
    by_path: Mapping[str, RepositoryFile] = {file.path: file for file in repository.files}
    config = by_path.get(CONFIG)
    weights = next((by_path[path] for path in WEIGHTS if path in by_path), None)
    if config is not None and weights is not None:
        return config, weights
    pickles = [path for path in _PICKLES if path in by_path]
    if config is not None and pickles:
        raise HubError(
            f"{repository.id}: its weights are a pickle ({pickles[0]}), which is code: refused",
            hint="Ask its owner for adapter_model.safetensors.",
        )
    missing = [CONFIG] * (config is None) + [WEIGHTS[0]] * (weights is None)
    raise HubError(
        f"{repository.id}: not an adapter's repository: it has no {' and no '.join(missing)}",
        problems=[file.path for file in repository.files[:20]],
        hint="Those are its files. A base is fetched with `edgelora pull base`.",
    )


def train_file(repository: Repository) -> RepositoryFile:
    """The train split of a dataset's repository, as parquet.

    Raises:
        HubError: there is none, or it is in several parts; what there is, is listed.
    """
    found = [
        file
        for file in repository.files
        if file.path.endswith(".parquet")
        and "train" in (PurePosixPath(file.path).name[:5], PurePosixPath(file.path).parent.name)
    ]
    if len(found) == 1:
        return found[0]
    raise HubError(
        f"{repository.id}: {len(found)} parquet files of a train split, where one is expected "
        "(data/train-00000-of-00001.parquet)",
        problems=[file.path for file in repository.files[:20]],
        hint="Pull without signatures (--no-signatures), or add the data yourself: "
        "`edgelora bank add --data`.",
    )
