"""Arms of an evaluation measured on the workers of a Dask scheduler, each with a base kept open.

Datasets and results stay where they are: this process draws the lines, sends them, takes the lines
of results back and writes. A worker needs EdgeLoRA, the base and the bank, at the same paths as
here: a build reads many adapters.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgelora import __version__
from edgelora.adapters.base import Base
from edgelora.bank import Bank, open_bank
from edgelora.bank.calibration import calibration_path
from edgelora.bank.remote import refuse_other_base, refuse_other_version
from edgelora.build import Options
from edgelora.cluster import open_cluster, tell
from edgelora.datasets.template import open_template
from edgelora.desk import Desk
from edgelora.engine.model import ModelOptions, open_model
from edgelora.engine.prepare import model_template
from edgelora.errors import ClusterError, EdgeLoRAError
from edgelora.leave_one_out.arms import Case, measure
from edgelora.leave_one_out.lines import Row
from edgelora.leave_one_out.run import Each, Measure
from edgelora.summarise import embedding_name


@contextlib.contextmanager
def open_remote_measure(
    base: Base,
    bank: Bank,
    scheduler: str,
    options: Options,
    *,
    template: str | None = None,
    n_threads: int = 0,
    low_ram: bool | None = False,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Measure, Each]]:
    """Yield what `evaluate_bank` takes as `measure` and `each`; every worker is looked at first.

    Args:
        scheduler: its address, e.g. `tcp://host:8786`.
        options: of the builds.
        template: instead of the base's own; a file is read here.
        n_threads: of each worker; 0 means all physical cores of its machine.
        low_ram: see engine.model.ModelOptions; None lets each worker's memory decide.

    Raises:
        ClusterError: no scheduler, no worker, or one without the same EdgeLoRA, base and bank.
        TemplateError: see datasets.template.open_template.
    """
    if template is not None:
        template = open_template(base.chat_template, template, "", "", ()).source
    there = RemoteMeasure.of(base, bank, options, template, n_threads, low_ram)
    with open_cluster(scheduler, warn) as cluster:
        cluster.check(there.check)
        yield there, cluster.each


@dataclass(frozen=True)
class RemoteMeasure:
    """A Measure that runs on a worker. It travels; base and bank do not.

    Attributes:
        base, bank: absolute paths.
        base_id, size_bytes: as in bank.remote.RemoteEmbed.
        contents: see `contents_of`.
        template: its text; None for the base's own.
        version, embedding: how this EdgeLoRA builds and embeds.
    """

    base: str
    base_id: str
    size_bytes: int
    bank: str
    contents: str
    options: Options
    template: str | None
    n_threads: int
    low_ram: bool | None
    version: str = __version__
    embedding: str = embedding_name()

    @classmethod
    def of(
        cls,
        base: Base,
        bank: Bank,
        options: Options,
        template: str | None = None,
        n_threads: int = 0,
        low_ram: bool | None = False,
    ) -> RemoteMeasure:
        """For a base and a bank of this machine."""
        return cls(
            str(base.path.absolute()),
            base.identity.id,
            base.path.stat().st_size,
            str(bank.path.absolute()),
            contents_of(bank, base.identity.id),
            options,
            template,
            n_threads,
            low_ram,
        )

    def check(self) -> None:
        """Whether this process would measure as the one does that asks.

        Raises:
            ClusterError: another version of EdgeLoRA, another base or none, another bank or none.
        """
        refuse_other_version(self.version, self.embedding)
        refuse_other_base(self.base, self.base_id, self.size_bytes)
        try:
            found = contents_of(open_bank(Path(self.bank)), self.base_id)
        except (EdgeLoRAError, OSError) as error:
            text = error.what if isinstance(error, EdgeLoRAError) else str(error)
            raise ClusterError(f"the bank cannot be read there: {text}") from error
        if found != self.contents:
            raise ClusterError(f"{self.bank}: other adapters, signatures or calibration than here")

    def __call__(self, case: Case) -> Row:
        row, warnings = _desk().call(self, case)
        for warning in warnings:
            tell(warning)
        return row


def contents_of(bank: Bank, base_id: str) -> str:
    """A hash of what a build takes from a bank: adapters, signatures and calibration for a base.

    Raises:
        InvalidFile: a damaged signature.
    """
    digest = hashlib.sha256()
    for record in bank.records():
        if record.base_id == base_id:
            digest.update(f"{record.name} {record.content_sha256};".encode())
            if record.has_signature:
                digest.update(bank.signature(record.name, base_id).to_bytes())
    calibration = calibration_path(bank, base_id)
    if calibration.is_file():
        digest.update(calibration.read_bytes())
    return digest.hexdigest()


@functools.cache
def _desk() -> Desk[RemoteMeasure, Case, Row]:
    """The one of this process."""
    return Desk(_opened)


@contextlib.contextmanager
def _opened(how: RemoteMeasure, warn: Callable[[str], None]) -> Iterator[Measure]:
    how.check()
    options = ModelOptions(n_threads=how.n_threads, low_ram=how.low_ram)
    with open_model(Path(how.base), options) as model:
        template = model_template(model, how.template)
        for warning in (*model.warnings, *template.warnings):
            warn(warning)
        yield functools.partial(measure, model, open_bank(Path(how.bank)), template, how.options)
