"""Signatures made on the workers of a Dask scheduler, each with a base of its own kept open.

The bank and the datasets stay where they are: this process reads them, sends the examples, takes
signatures back and writes. A worker needs EdgeLoRA and the base, at the same path as here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgelora import __version__
from edgelora.adapters.base import Base, read_base
from edgelora.bank.adding import Each, Embed
from edgelora.bank.embedding import open_embedder
from edgelora.cluster import open_cluster, tell
from edgelora.datasets.records import Dataset
from edgelora.desk import Desk
from edgelora.errors import ClusterError, EdgeLoRAError
from edgelora.signature import Signature
from edgelora.summarise import embedding_name


@contextlib.contextmanager
def open_remote_embedder(
    base: Base,
    scheduler: str,
    *,
    n_layers: int = 0,
    n_threads: int = 0,
    low_ram: bool | None = False,
    seed: int = 0,
    n_embedded: int = 0,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Embed, Each]]:
    """Yield what `add_many` takes as `embed` and `each`; every worker is looked at first.

    Args:
        scheduler: its address, e.g. `tcp://host:8786`.
        n_layers: see bank.embedding.layers_for.
        n_threads: of each worker; 0 means all physical cores of its machine.
        n_embedded: see bank.embedding.open_embedder; time cuts nothing on workers.
        low_ram: see engine.model.ModelOptions; None lets each worker's memory decide.

    Raises:
        ClusterError: no scheduler, no worker, or one without the same EdgeLoRA and base.
    """
    embed = RemoteEmbed.of(base, n_threads, seed, n_layers, low_ram, n_embedded)
    with open_cluster(scheduler, warn) as cluster:
        cluster.check(embed.check)
        yield embed, cluster.each


@dataclass(frozen=True)
class RemoteEmbed:
    """An Embed that runs on a worker. It travels; the base does not.

    Attributes:
        base: absolute path of the GGUF.
        base_id, size_bytes: which model and which file of it. Files of equal size whose weights
            were quantised differently are NOT told apart.
        version, embedding: how this EdgeLoRA embeds.
    """

    base: str
    base_id: str
    size_bytes: int
    n_threads: int
    seed: int
    n_layers: int = 0
    low_ram: bool | None = False
    n_embedded: int = 0
    version: str = __version__
    embedding: str = embedding_name()

    @classmethod
    def of(
        cls,
        base: Base,
        n_threads: int,
        seed: int,
        n_layers: int = 0,
        low_ram: bool | None = False,
        n_embedded: int = 0,
    ) -> RemoteEmbed:
        """For a base of this machine."""
        return cls(
            str(base.path.absolute()),
            base.identity.id,
            base.path.stat().st_size,
            n_threads,
            seed,
            n_layers,
            low_ram,
            n_embedded,
            embedding=embedding_name(n_layers),
        )

    def check(self) -> None:
        """Whether this process would embed as the one does that asks.

        Raises:
            ClusterError: another version of EdgeLoRA, or another base or none at the path.
        """
        refuse_other_version(self.version, self.embedding, self.n_layers)
        refuse_other_base(self.base, self.base_id, self.size_bytes)

    def __call__(self, what: Dataset | str) -> Signature:
        signature, warnings = _desk().call(self, what)
        for warning in warnings:
            tell(warning)
        return signature


def refuse_other_version(version: str, embedding: str, n_layers: int = 0) -> None:
    """Raise ClusterError unless this process's EdgeLoRA is of that version and embeds so."""
    here = embedding_name(n_layers)
    if (version, embedding) != (__version__, here):
        raise ClusterError(f"EdgeLoRA {__version__} ({here}), not {version} ({embedding})")


def refuse_other_base(base: str, base_id: str, size_bytes: int) -> None:
    """Raise ClusterError unless the file at that path is that base, and of that size."""
    path = Path(base)
    try:
        found = (read_base(path).identity.id, path.stat().st_size)
    except (EdgeLoRAError, OSError) as error:
        text = error.what if isinstance(error, EdgeLoRAError) else str(error)
        raise ClusterError(f"the base cannot be read there: {text}") from error
    if found != (base_id, size_bytes):
        raise ClusterError(
            f"{path}: another base than here ({found[0]}, {found[1]} bytes; "
            f"not {base_id}, {size_bytes} bytes)"
        )


@functools.cache
def _desk() -> Desk[RemoteEmbed, Dataset | str, Signature]:
    """The one of this process."""
    return Desk(_opened)


@contextlib.contextmanager
def _opened(how: RemoteEmbed, warn: Callable[[str], None]) -> Iterator[Embed]:
    how.check()
    with open_embedder(
        Path(how.base),
        n_layers=how.n_layers,
        n_threads=how.n_threads,
        low_ram=how.low_ram,
        n_embedded=how.n_embedded,
        seed=how.seed,
        warn=warn,
    ) as embed:
        yield embed
