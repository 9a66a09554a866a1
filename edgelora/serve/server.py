"""One server: the base, its adapters and the engine thread, opened while the port is open."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgelora.errors import EdgeLoRAError
from edgelora.serve.settings import Settings

if TYPE_CHECKING:
    from edgelora.datasets.template import Template
    from edgelora.engine.model import Model
    from edgelora.serve.memory import Room
    from edgelora.serve.routing import Router
    from edgelora.serve.scheduler import Scheduler
    from edgelora.serve.served import Registry

logger = logging.getLogger("edgelora.serve")
Say = Callable[[str], None]
Part = TypeVar("Part")


class NotReady(EdgeLoRAError):
    """The model is still being opened, or the server is ending."""


class Server:
    """What endpoints use of a running server.

    Attributes:
        settings: what it was started with.
        router: picks the adapter for `model: "auto"`; None until the model is open.
        failure: what ended the engine, if something did.
        started: when it began, in seconds since 1970.
    """

    def __init__(
        self, settings: Settings, *, say: Say = lambda line: None, warn: Say = lambda line: None
    ) -> None:
        self.settings = settings
        self.started = time.time()
        self.router: Router | None = None
        self.failure: BaseException | None = None
        self._say, self._warn = say, warn
        self._model: Model | None = None
        self._template: Template | None = None
        self._template_error: EdgeLoRAError | None = None
        self._scheduler: Scheduler | None = None
        self._registry: Registry | None = None
        self._opened = contextlib.ExitStack()
        self._draining = False
        self._done = threading.Event()
        self.changed: Callable[[], None] = lambda: None
        self._loader = threading.Thread(target=self._load, name="edgelora-load", daemon=True)

    @property
    def state(self) -> str:
        """ "loading", "ready", "draining" or "failed"."""
        if self.failure is not None:
            return "failed"
        if self._draining:
            return "draining"
        return "ready" if self._done.is_set() else "loading"

    @property
    def is_open(self) -> bool:
        """Whether there are a model, a registry and a scheduler, in whatever state."""
        return self._done.is_set() and self._scheduler is not None

    @property
    def model(self) -> Model:
        """The base."""
        return _opened(self._model)

    @property
    def template(self) -> Template:
        """How messages become a prompt.

        Raises:
            TemplateError: the base has no chat template and none was given.
        """
        if self._template_error is not None:
            raise self._template_error
        return _opened(self._template)

    @property
    def scheduler(self) -> Scheduler:
        """The engine thread."""
        return _opened(self._scheduler)

    @property
    def registry(self) -> Registry:
        """The ids of models."""
        return _opened(self._registry)

    def start(self) -> None:
        """Begin to open the model in a thread of its own."""
        self._loader.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the model can answer.

        Raises:
            NotReady: it took longer than `timeout_s`.
            EdgeLoRAError, ...: what ended the opening.
        """
        if not self._done.wait(timeout_s):
            raise NotReady(f"the model was not ready within {timeout_s:g} s")
        if self.failure is not None:
            raise self.failure

    @property
    def is_loading(self) -> bool:
        """Whether the model is being opened, which llama.cpp does not interrupt."""
        return not self._done.is_set()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False if some had to be cut off."""
        self._draining = True
        if self._scheduler is None or self._scheduler.drain(timeout_s):
            return True
        self._scheduler.stop()
        return False

    def close(self) -> None:
        """Stop the engine and free the model, once it is open."""
        self._draining = True
        self._loader.join()
        self._opened.close()

    def _load(self) -> None:
        try:
            self._open()
            self._done.set()
            self._say(self._summary())
        except BaseException as error:
            self._fail(error)
            self._done.set()
        self.changed()

    def _summary(self) -> str:
        names = self.registry.ids()
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"ready after {time.time() - self.started:.1f} s; models: {shown}"

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, EdgeLoRAError):
            logger.critical("the engine failed", exc_info=error)
        self.failure = self.failure or error
        self.changed()

    def _open(self) -> None:
        from edgelora.engine.model import ModelOptions, open_model
        from edgelora.memory import return_large_blocks
        from edgelora.serve.jobs import Limits
        from edgelora.serve.routing import open_router
        from edgelora.serve.scheduler import Scheduler

        s = self.settings
        return_large_blocks()
        options = ModelOptions(n_threads=s.n_threads, low_ram=s.low_ram, mlock=s.mlock)
        self._model = self._opened.enter_context(open_model(s.base, options))
        for warning in self._model.warnings:
            self._warn(warning)
        self._open_template(self._model)
        room = self._fit(self._model)
        limits = Limits(
            n_slots=room.n_slots,
            n_ctx=room.n_ctx,
            cache_bytes=room.cache_bytes,
            n_batch=s.n_batch,
            kv_type=s.kv_type,
            max_queue=s.max_queue,
            queue_timeout_s=s.queue_timeout_s,
        )
        scheduler = Scheduler(self._model, limits, on_failure=self._fail)
        self._registry = self._make_registry(self._model, scheduler)
        scheduler.start()
        self._opened.callback(scheduler.stop)
        self._scheduler = scheduler
        self.router = open_router(self._registry, scheduler, s.bank)

    def _open_template(self, model: Model) -> None:
        """A base without a template can complete and embed; only chat is refused."""
        from edgelora.engine.prepare import model_template
        from edgelora.errors import TemplateError

        try:
            self._template = model_template(model, self.settings.template)
        except TemplateError as error:
            if self.settings.template is not None:
                raise
            self._template_error = error
            self._warn(f"{error} Until then /v1/chat/completions is refused.")

    def _fit(self, model: Model) -> Room:
        from edgelora.engine.needs import needs_of
        from edgelora.memory import available_bytes
        from edgelora.serve.memory import fit

        s = self.settings
        needs = needs_of(s.base, n_batch=s.n_batch)
        mapped = needs.weights_bytes - (0 if model.options.low_ram else needs.repacked_bytes)
        room = fit(
            model.base,
            needs,
            n_ctx_train=model.n_ctx_train,
            available_bytes=available_bytes() - mapped,
            kv_type=s.kv_type,
            n_slots=s.n_slots,
            n_ctx=s.n_ctx,
            cache_bytes=s.cache_bytes,
        )
        self._say(room.describe(s.kv_type))
        return room

    def _make_registry(self, model: Model, scheduler: Scheduler) -> Registry:
        """The ids; what is kept in memory is loaded before the context is made."""
        from edgelora.serve.served import Registry

        s = self.settings
        registry = Registry(
            model.base,
            s.base_id or s.base.stem,
            scheduler,
            max_loaded=s.max_loaded,
            max_scale=s.limits.max_scale,
            max_adapters=s.limits.max_adapters,
        )
        named = {str(path) for path in s.adapters if s.bank is not None and not path.is_file()}
        for path in s.adapters:
            if str(path) not in named:
                registry.add(path)
        if s.bank is not None:
            self._add_bank(s.bank, registry, named)
        for served in registry.adapters():
            if served.kept and served.path is not None:
                model.adapter(served.path)
                registry.note_loaded(served.id)
        return registry

    def _add_bank(self, folder: Path, registry: Registry, named: set[str]) -> None:
        """Every adapter of the bank that is for this base; those in `named` stay in memory."""
        from edgelora.bank.opening import open_bank

        bank, n_others = open_bank(folder), 0
        for name in sorted(named):
            bank.open(name, registry.base)  # says what is wrong with a name that is not there
        for record in bank.records():
            if record.base_id != registry.base.identity.id:
                n_others += 1
                continue
            kept = self.settings.load_all or record.name in named
            registry.add_from_bank(record.path, record.name, kept=kept)
        if n_others:
            self._warn(f"{folder}: {n_others} adapters are for another base and are left out")


@contextlib.contextmanager
def open_server(
    settings: Settings, *, say: Say = lambda line: None, warn: Say = lambda line: None
) -> Iterator[Server]:
    """A server whose model is being opened; it is closed at the end of the block.

    Args:
        say, warn: are told, from another thread, what a person should know.
    """
    server = Server(settings, say=say, warn=warn)
    server.start()
    try:
        yield server
    finally:
        server.close()


def _opened(part: Part | None) -> Part:
    if part is None:
        raise NotReady("the model is still being loaded")
    return part
