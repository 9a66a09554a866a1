"""Work spread over the workers of a Dask scheduler: each item is answered once, whatever dies.

This process hands out and receives; nothing of Dask is written to disk. Dask itself speaks pickle
between client, scheduler and workers: whoever can reach one of them can run code on all of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, TypeVar

from edgelora.errors import ClusterError, EdgeLoRAError

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECT_S = 15.0
NO_WORKER_S = 60.0
_POLL_S = 1.0
_RESULT_S = 30.0
_MISSING = 'a scheduler needs Dask distributed: pip install "edgelora[cluster]"'
_SAME = (
    "Scheduler and workers need the same EdgeLoRA as this machine, with its extra `cluster`, and "
    "the same files at the same paths."
)
_AGAIN = "What was finished is kept. Run the same command again: it does what is missing."
_told: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("told", default=None)


@dataclass(frozen=True)
class _Answer:
    """What one call of the work gave, and what it had to say; it travels from a worker."""

    value: Any
    told: tuple[str, ...] = ()


def tell(text: str) -> None:
    """Called by the work, in its own thread: a warning that goes back with the answer."""
    told = _told.get()
    if told is not None:
        told.append(text)


class Cluster:
    """A connection to a scheduler; see `open_cluster`."""

    def __init__(self, address: str, client: Any, warn: Callable[[str], None]) -> None:
        self.address = address
        self._client = client
        self._warn = warn
        self._warned: set[str] = set()

    def check(self, probe: Callable[[], None]) -> None:
        """Call `probe` on every worker that is there now, before any work.

        Raises:
            ClusterError: no worker came within NO_WORKER_S, EdgeLoRA is missing somewhere, or the
                probe raised an error on some worker; all of them are named.
        """
        self._n_threads()
        with self._explained():
            found = self._client.run(_attempt, probe, on_error="return")
            found["the scheduler"] = self._on_scheduler()
        problems = [
            f"{where}: {said}"
            for where, said in sorted(found.items())
            if said and not isinstance(said, OSError)  # that is a worker that has died
        ]
        if problems:
            raise ClusterError(
                f"{self.address}: not everything there can do this work",
                problems=problems,
                hint=_SAME,
            )

    def each(
        self, work: Callable[[Item], Result], items: Iterable[tuple[Key, Item]]
    ) -> Iterator[tuple[Key, Result | EdgeLoRAError]]:
        """Call `work` on the workers with each item; keys and answers come back as they finish.

        What a dead worker was doing is done again by another. Items are taken only as there is a
        free thread for them, so a long iterable is never held whole; left early (Ctrl-C), whatever
        has not begun is withdrawn.

        Args:
            work: pickled by reference, so a function of a module, `functools.partial` of one, or an
                instance of a class of one. It may `tell` warnings, each of which is said once.
            items: key and argument. The argument is pickled; the key stays here.

        Returns:
            Each key once, with the result or with the EdgeLoRAError that is its own: one that the
            work raised, or a ClusterError if too many workers died over it (Dask's
            `distributed.scheduler.allowed-failures`).

        Raises:
            ClusterError: the work raised one itself, or anything but an EdgeLoRAError; the
                scheduler has gone, or there was no worker for NO_WORKER_S.
        """
        job = f"edgelora-{uuid.uuid4().hex[:8]}"
        source, running = enumerate(items), dict[Any, Key]()
        try:
            while True:
                # One for each thread and no more: Dask blames a death on all that a worker holds.
                free = self._n_threads() - len(running)
                for i, (key, item) in itertools.islice(source, max(0, free)):
                    running[self._submit(f"{job}-{i}", work, item)] = key
                if not running:
                    return
                for future, answer in self._finished(list(running)):
                    key = running.pop(future)
                    future.release()  # or it is done again should its worker die now
                    yield key, answer
        finally:
            if running:
                with contextlib.suppress(Exception):  # the scheduler may have gone
                    self._client.cancel(list(running), force=True)

    def _submit(self, name: str, work: Callable[[Any], Any], item: object) -> Any:
        with self._explained():
            return self._client.submit(_answer, work, item, key=name, pure=False)

    def _finished(self, running: list[Any]) -> Iterator[tuple[Any, Any]]:
        """Those that have ended or end within _POLL_S, each with its result or its own error."""
        from distributed import wait

        with self._explained():
            try:
                done = wait(running, timeout=_POLL_S, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                return
        for future in done:
            answer = self._refusal(future) or self._received(future)
            if answer is not None:
                self._say(answer.told)
                yield future, answer.value

    def _refusal(self, future: Any) -> _Answer | None:
        """What is said of an item over which too many workers died.

        Raises:
            ClusterError: its work failed otherwise, and would fail with the next item too.
        """
        from distributed import KilledWorker

        if future.status != "error":
            return None
        with self._explained():
            error = future.exception()
        if not isinstance(error, KilledWorker):
            raise ClusterError(
                f"{self.address}: a worker failed ({type(error).__name__}: {_first_line(error)})",
                hint=f"Its log tells more. {_SAME}",
            ) from error
        n = error.allowed_failures + 1
        died = "a worker died" if n == 1 else f"{n} workers died, one after another,"
        return _Answer(
            ClusterError(
                f"{died} while at work on it (the last was {error.last_worker.address})",
                hint="Their logs may say why; often it is memory (dask worker --memory-limit).",
            )
        )

    def _received(self, future: Any) -> _Answer | None:
        """The answer of a task; None if its worker died with it, so that it is made again."""
        with self._explained():
            try:
                answer = future.result(timeout=_RESULT_S)
            except TimeoutError:
                return None
        assert isinstance(answer, _Answer)
        if isinstance(answer.value, ClusterError):
            raise answer.value
        return answer

    def _n_threads(self) -> int:
        """Threads of all workers, waited for if there is no worker at all."""
        deadline = time.monotonic() + NO_WORKER_S
        with self._explained():
            while not (n := sum(self._client.nthreads().values())):
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"{self.address}: there has been no worker for {NO_WORKER_S:g} s",
                        hint=f"Start one: dask worker {self.address} --nthreads 1. {_AGAIN}",
                    )
                time.sleep(_POLL_S / 4)
        return int(n)

    def _on_scheduler(self) -> str:
        try:
            return str(self._client.run_on_scheduler(_attempt, _nothing))
        except ImportError as error:
            return f"{type(error).__name__}: {error}"

    def _say(self, told: Iterable[str]) -> None:
        for text in told:
            if text not in self._warned:
                self._warned.add(text)
                self._warn(text)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Dask's errors of connections mean that the scheduler does not answer any more."""
        try:
            yield
        except (OSError, CancelledError) as error:
            raise ClusterError(
                f"{self.address}: the scheduler has gone "
                f"({type(error).__name__}: {_first_line(error)})",
                hint=_AGAIN,
            ) from error


@contextlib.contextmanager
def open_cluster(
    address: str, warn: Callable[[str], None] = lambda text: None
) -> Iterator[Cluster]:
    """Connect to a scheduler, e.g. `tcp://host:8786`; `tls://` takes certificates from Dask's
    configuration.

    Args:
        warn: is told what the work `tell`s, each text once.

    Raises:
        ClusterError: Dask distributed is not installed, or no scheduler answers at `address`.
    """
    try:
        import dask
        import distributed
    except ImportError as error:
        raise ClusterError(_MISSING) from error
    _quieten()
    # Datasets of more than 10 MB are meant to travel; Dask would warn of each.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"}):
        try:
            client = distributed.Client(address, timeout=CONNECT_S)
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(
                f"{address}: no scheduler of Dask answers there ({_first_line(error)})",
                hint="Start one with `dask scheduler`; it prints its address.",
            ) from error
        try:
            yield Cluster(address, client, warn)
        finally:
            with contextlib.suppress(Exception):
                client.close(timeout=_POLL_S)


def _answer(work: Callable[[Any], Any], item: object) -> _Answer:
    """Runs on a worker. An EdgeLoRAError is an answer too: Dask would log it as its own failure."""
    told: list[str] = []
    token = _told.set(told)
    try:
        return _Answer(work(item), tuple(told))
    except EdgeLoRAError as error:
        return _Answer(error, tuple(told))
    finally:
        _told.reset(token)


def _attempt(probe: Callable[[], None]) -> str:
    """Runs on a worker: what the probe has to say against it."""
    try:
        probe()
    except EdgeLoRAError as error:
        return error.what
    return ""


def _nothing() -> None:
    """A probe that only shows that EdgeLoRA can be imported."""


def _quieten() -> None:
    """Dask's own handlers and levels go: the root logger decides what is shown (`-v`)."""
    for name in (
        "distributed",
        "distributed.client",
        "distributed.gc",
        "tornado",
        "tornado.application",
    ):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
