"""What the engine thread does between steps: embeddings, and adapters that come and go."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.context import Context, open_context
from edgelora.engine.embed import WINDOW, embed_in_steps
from edgelora.engine.model import Model
from edgelora.errors import EdgeLoRAError
from edgelora.serve.batching import ALONE_S, MIXED_S
from edgelora.serve.jobs import AdapterSet
from edgelora.serve.stepper import Stepper

# A task is a generator that is resumed once between two steps; what it returns is its result.
Task = Generator[None, None, Any]
PathsInUse = Callable[[], set[Path]]


@dataclass
class _Entry:
    """A task that waits or runs; `paths` are the adapters that it needs."""

    future: Future[Any]
    begin: Callable[[Stepper], Task]
    paths: frozenset[Path] = frozenset()
    task: Task | None = None


class SideTasks:
    """Tasks in the order they came; each goes on by one part between two steps of generation."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._entries: collections.deque[_Entry] = collections.deque()
        self._unloads: list[tuple[Future[None], Path]] = []
        self._stack = contextlib.ExitStack()
        self._hidden: Context | None = None

    @property
    def n_open(self) -> int:
        """Tasks that are not done."""
        return len(self._entries) + len(self._unloads)

    def embed(
        self, texts: Sequence[tuple[int, ...]], adapters: AdapterSet, n_layers: int = 0
    ) -> Future[NDArray[np.float32]]:
        """Embed texts under an adapter set, after so many layers (0: all)."""
        paths = frozenset(adapter.path.resolve() for adapter in adapters)
        entry = _Entry(Future(), lambda s: self._embedding(texts, adapters, n_layers, s), paths)
        self._entries.append(entry)
        return entry.future

    def load(self, path: Path) -> Future[None]:
        """Check and load an adapter file."""
        entry = _Entry(Future(), lambda stepper: self._loading(path))
        self._entries.append(entry)
        return entry.future

    def unload(self, path: Path) -> Future[None]:
        """Free an adapter as soon as no request uses it."""
        future: Future[None] = Future()
        self._unloads.append((future, path.resolve()))
        return future

    def is_ready(self, in_use: PathsInUse) -> bool:
        """Whether `run` would do something."""
        return bool(self._entries) or self._next_unload(in_use) is not None

    def run(self, stepper: Stepper, in_use: PathsInUse) -> None:
        """One part of the first task, and every unload that is possible now."""
        if self._entries:
            self._resume(self._entries[0], stepper)
        while (entry := self._next_unload(in_use)) is not None:
            future, path = entry
            self._unloads.remove(entry)
            if future.set_running_or_notify_cancel():
                try:
                    self._free(path, stepper)
                    future.set_result(None)
                except EdgeLoRAError as error:
                    future.set_exception(error)

    def fail(self, error: EdgeLoRAError) -> None:
        """The engine ends: nothing more is done."""
        futures = [entry.future for entry in self._entries] + [f for f, _ in self._unloads]
        self._entries.clear()
        self._unloads.clear()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def close(self) -> None:
        """Free the context for embeddings."""
        self._stack.close()

    def _resume(self, entry: _Entry, stepper: Stepper) -> None:
        """The future stays pending until the end, so that it can be cancelled in between."""
        if entry.task is None:
            entry.task = entry.begin(stepper)
        result, failure = None, None
        try:
            if not entry.future.cancelled():
                next(entry.task)
                return
        except StopIteration as end:
            result = end.value
        except EdgeLoRAError as error:
            failure = error
        self._entries.popleft()
        if not entry.future.set_running_or_notify_cancel():
            return
        if failure is not None:
            entry.future.set_exception(failure)
        else:
            entry.future.set_result(result)

    def _embedding(
        self,
        texts: Sequence[tuple[int, ...]],
        adapters: AdapterSet,
        n_layers: int,
        stepper: Stepper,
    ) -> Task:
        if self._hidden is None:
            self._hidden = self._stack.enter_context(
                open_context(self._model, n_ctx=WINDOW, n_batch=WINDOW, hidden=True)
            )
        self._hidden.apply(adapters)
        return (
            yield from embed_in_steps(
                self._hidden,
                texts,
                lambda: stepper.speed.n_rows_in(MIXED_S if stepper.is_watched else ALONE_S),
                n_layers,
            )
        )

    def _loading(self, path: Path) -> Task:
        yield from ()
        self._model.adapter(path)

    def _next_unload(self, in_use: PathsInUse) -> tuple[Future[None], Path] | None:
        if not self._unloads:
            return None
        paths = {path.resolve() for path in in_use()}.union(*(e.paths for e in self._entries))
        return next((entry for entry in self._unloads if entry[1] not in paths), None)

    def _free(self, path: Path, stepper: Stepper) -> None:
        stepper.forget(lambda key: _has(key, path))
        if self._hidden is not None and not any(entry.task for entry in self._entries):
            self._hidden.apply(())
        self._model.unload(path)


def _has(key: Hashable, path: Path) -> bool:
    """Whether an adapter set's key names a file."""
    return isinstance(key, tuple) and any(entry[0].resolve() == path for entry in key)
