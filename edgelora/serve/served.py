"""The models that a server offers by name: the base, and adapters that come and go."""

from __future__ import annotations

import collections
import functools
import logging
import math
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from edgelora.adapters import gguf_lora
from edgelora.adapters.base import Base
from edgelora.adapters.provenance import read_provenance
from edgelora.engine.model import WeightedAdapter, resolve_weights
from edgelora.errors import AlreadyExists, EdgeLoRAError, IncompatibleAdapter, NotFound

logger = logging.getLogger("edgelora.serve")

AUTO = "auto"
AdapterSet = tuple[WeightedAdapter, ...]
# Ids travel in URLs and in the header X-EdgeLoRA-Adapter.
_SAFE_ID = re.compile(r"[!-~](?:[ -~]{0,198}[!-~])?")
_TEXTS = ("template", "description", "source", "licence", "category")


class ModelNotFound(NotFound):
    """A model id or adapter name that this server does not have; the known ones are listed."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(
            f"The model {name[:200]!r} does not exist. Known models: {', '.join(known)}."
        )
        self.known = tuple(known)


class InvalidAdapterSet(EdgeLoRAError):
    """A `lora` list that means nothing: a scale that is no number, a name twice, too many."""


class InvalidName(EdgeLoRAError):
    """A name that cannot be a model's id."""


class LoraEntry(Protocol):
    """One entry of a request's `lora` list."""

    @property
    def name(self) -> str: ...
    @property
    def scale(self) -> float: ...


class Loader(Protocol):
    """What loads adapters for the registry: the scheduler."""

    def load(self, path: Path) -> Future[None]: ...
    def unload(self, path: Path) -> Future[None]: ...


@dataclass(frozen=True)
class Served:
    """One id of /v1/models.

    Attributes:
        path: the adapter's file; None for the base.
        created: when its file was written, in seconds since 1970.
        kept: it stays in memory until it is taken away (given at the start or through
            /v1/adapters); another of a bank leaves when others need its place.
        in_bank: its id stays when it is taken out of memory: it can be loaded again.
    """

    id: str
    path: Path | None
    created: int
    kept: bool = True
    in_bank: bool = False

    @functools.cached_property
    def provenance(self) -> Mapping[str, Any] | None:
        """How the adapter was made, as its file tells it; None for the base."""
        return None if self.path is None else read_provenance(gguf_lora.open_lora(self.path))

    @functools.cached_property
    def facts(self) -> Mapping[str, Any]:
        """What the adapter's header says; {} for the base."""
        if self.path is None:
            return {}
        lora = gguf_lora.open_lora(self.path)
        ranks = [lora.rank(name) for name in lora.names]
        texts = {key: lora.metadata.get(f"edgelora.{key}") for key in _TEXTS}
        return {
            "file": self.path.name,
            "size_bytes": self.path.stat().st_size,
            "n_tensors": len(ranks),
            "ranks": [min(ranks), max(ranks)],
        } | {key: str(value) for key, value in texts.items() if value is not None}


class Registry:
    """The ids of one server. Thread-safe: the event loop and the worker threads share it.

    Args:
        base_id: the id of the base; "auto" is nobody's.
        loader: loads and unloads files on the engine thread.
        max_loaded: adapters that are in memory at once, those that are kept included. They are
            more only while all of them are kept.
    """

    def __init__(
        self,
        base: Base,
        base_id: str,
        loader: Loader,
        *,
        max_loaded: int = 32,
        max_scale: float = 100.0,
        max_adapters: int = 16,
    ) -> None:
        self.base_id = check_id(base_id)
        self.base = base
        self._loader = loader
        self._max_loaded, self._max_scale = max_loaded, max_scale
        self._max_adapters = max_adapters
        self._lock = threading.RLock()
        self._served = {base_id: Served(base_id, None, _written(base.path))}
        self._loaded: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._counts: collections.Counter[str] = collections.Counter()

    def ids(self) -> list[str]:
        """Every id, the base's first."""
        with self._lock:
            return list(self._served)

    def adapters(self) -> list[Served]:
        """Every adapter, in the order in which they came."""
        with self._lock:
            return [served for served in self._served.values() if served.path is not None]

    def get(self, model_id: str) -> Served:
        """One model.

        Raises:
            ModelNotFound: there is none of that id.
        """
        with self._lock:
            if model_id not in self._served:
                raise ModelNotFound(model_id, list(self._served))
            return self._served[model_id]

    def is_loaded(self, model_id: str) -> bool:
        """Whether an adapter is in memory (or on its way there)."""
        with self._lock:
            return model_id in self._loaded

    def counts(self) -> Mapping[str, int]:
        """Requests that asked for each id so far."""
        with self._lock:
            return {name: self._counts[name] for name in self._served}

    def resolve(
        self, model: str | None, lora: Sequence[LoraEntry] | None = None
    ) -> tuple[str, AdapterSet]:
        """The id that a request asks for and its adapters, by path, with weights that are not 0.

        None and "" mean the base. `lora` replaces the model's own adapter: the base with exactly
        this set. "auto" gives ("auto", ()): what it means depends on the prompt. An adapter that
        is not in memory begins to be loaded.

        Raises:
            ModelNotFound: an unknown id.
            InvalidAdapterSet: a scale that is not a finite number within the limit, a name twice.
        """
        named = self.base_id if model in (None, "") else str(model)
        with self._lock:
            if named != AUTO:
                served = self.get(named)
            if lora is not None:
                return self.base_id, self._weighted(lora)
            self._counts[named] += 1
            if named == AUTO or served.path is None:
                return named, ()
            self._touch(named)
            return named, (WeightedAdapter(served.path),)

    def add(self, path: Path, name: str | None = None) -> Served:
        """Make an adapter's file known; it is not loaded yet.

        Args:
            name: its id; the file's stem if None.

        Raises:
            NotFound, InvalidFile, UnsupportedFile: not a sound GGUF LoRA.
            IncompatibleAdapter: made for another base, or names and shapes do not fit.
            AlreadyExists: the id belongs to the base, to another file, or to nobody ("auto").
        """
        chosen = check_id(name or path.stem)
        problems = gguf_lora.check(gguf_lora.open_lora(path), self.base)
        if problems:
            raise IncompatibleAdapter(
                f"{path.name}: does not fit {self.base.path.name}", problems=problems
            )
        return self._add(path, chosen, kept=True, in_bank=False)

    def add_from_bank(self, path: Path, name: str, *, kept: bool = False) -> Served:
        """`add` for an adapter of a bank, whose record is trusted until it is loaded.

        Raises:
            AlreadyExists: as for `add`.
        """
        return self._add(path, check_id(name), kept=kept, in_bank=True)

    def _add(self, path: Path, name: str, *, kept: bool, in_bank: bool) -> Served:
        path = path.resolve()  # as the engine names it
        with self._lock:
            known = self._served.get(name)
            if known is not None and known.path != path:
                owner = "the base" if known.path is None else known.path.name
                raise AlreadyExists(
                    f"The id {name!r} belongs to {owner} already.", hint="Give another name."
                )
            if known is not None:
                kept, in_bank = kept or known.kept, in_bank or known.in_bank
            self._served[name] = Served(name, path, _written(path), kept, in_bank)
            return self._served[name]

    def load(self, name: str) -> Future[None]:
        """Bring an adapter into memory; the future ends when it is there, or with the error."""
        with self._lock:
            path = self.get(name).path
            assert path is not None, "the base is always loaded"
            future = self._loader.load(path)
            self._loaded[name] = None
            self._loaded.move_to_end(name)
            self._make_room(name)
        future.add_done_callback(functools.partial(self._on_loaded, name))
        return future

    def note_loaded(self, name: str) -> None:
        """Say that an adapter was loaded before the engine thread began."""
        with self._lock:
            self._loaded[name] = None

    def remove(self, name: str) -> Future[None]:
        """Take an adapter out of memory; its id goes too, unless it is a bank's.

        Raises:
            ModelNotFound: no such adapter.
        """
        with self._lock:
            served = self.get(name)
            if served.path is None:
                raise ModelNotFound(name, [adapter.id for adapter in self.adapters()])
            if served.in_bank:
                self._served[name] = replace(served, kept=False)
            else:
                del self._served[name]
            self._loaded.pop(name, None)
            return self._loader.unload(served.path)

    def _weighted(self, lora: Sequence[LoraEntry]) -> AdapterSet:
        problems = list(self._problems(lora))
        if problems:
            raise InvalidAdapterSet("; ".join(problems))
        weighted = []
        for entry in lora:
            served = self.get(entry.name)
            if served.path is None:
                names = [adapter.id for adapter in self.adapters()]
                raise ModelNotFound(entry.name, names)
            self._counts[entry.name] += 1
            if entry.scale != 0:
                self._touch(entry.name)
                weighted.append(WeightedAdapter(served.path, float(entry.scale)))
        return tuple(sorted(resolve_weights(weighted), key=lambda adapter: adapter.path))

    def _problems(self, lora: Sequence[LoraEntry]) -> Iterable[str]:
        if len(lora) > self._max_adapters:
            yield f"lora has {len(lora)} entries, at most {self._max_adapters} are possible"
            return
        names = [entry.name for entry in lora]
        for name in {name for name in names if names.count(name) > 1}:
            yield f"lora names {name[:200]!r} more than once"
        for entry in lora:
            if not (math.isfinite(entry.scale) and abs(entry.scale) <= self._max_scale):
                yield (
                    f"the scale of {entry.name[:200]!r} is not a number "
                    f"from -{self._max_scale:g} to {self._max_scale:g}"
                )

    def _touch(self, name: str) -> None:
        if name in self._loaded:
            self._loaded.move_to_end(name)
        else:
            self.load(name)

    def _make_room(self, newcomer: str) -> None:
        """Let the longest unused adapters that are not kept leave; the engine thread does it
        between two steps, and loads one anew that a waiting request still wants."""
        for name in list(self._loaded):
            if len(self._loaded) <= self._max_loaded:
                return
            served = self._served.get(name)
            if name != newcomer and served is not None and not served.kept and served.path:
                del self._loaded[name]
                self._loader.unload(served.path).add_done_callback(_log_failure)

    def _on_loaded(self, name: str, future: Future[None]) -> None:
        if future.cancelled() or future.exception() is not None:
            with self._lock:
                self._loaded.pop(name, None)
        _log_failure(future)


def check_id(name: str) -> str:
    """The name itself, if it can be a model's id.

    Raises:
        AlreadyExists: "auto", which asks the server to choose.
        InvalidName: characters that ids cannot have.
    """
    if name == AUTO:
        raise AlreadyExists(
            "The id 'auto' means that the server chooses.", hint="Give another name."
        )
    if not _SAFE_ID.fullmatch(name):
        raise InvalidName(
            f"{name[:200]!r} cannot be a model's id.",
            hint="Printable ASCII, no space at either end, at most 200 characters.",
        )
    return name


def _log_failure(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.error("an adapter: %s", error)


def _written(path: Path) -> int:
    return int(path.stat().st_mtime)
