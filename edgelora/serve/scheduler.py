"""The engine thread: many requests in one llama.cpp context, by continuous batching."""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.context import Context, open_context
from edgelora.engine.model import Model
from edgelora.engine.sampling import open_sampler
from edgelora.errors import EdgeLoRAError, EngineError, NotFound
from edgelora.serve.cells import Cells
from edgelora.serve.counters import Counters, Stats
from edgelora.serve.jobs import (
    AdapterSet,
    ContextOverflow,
    Draining,
    Emit,
    Job,
    Limits,
    QueueFull,
    QueueTimeout,
)
from edgelora.serve.requests import Pieces, Request
from edgelora.serve.side_tasks import SideTasks
from edgelora.serve.stepper import Stepper

__all__ = ["Emit", "Scheduler", "Stats", "Ticket", "adapter_key"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

_MAX_SEQUENCES = 256  # llama.cpp's own limit
_N_OUTPUTS = 64  # tokens of one batch whose logits may be wanted: a prompt that is scored


class Ticket:
    """A submitted job; `cancel` is all that can be done to it."""

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self._scheduler = scheduler
        self._request = request

    def cancel(self) -> None:
        """Give the answer up: its slot is free after the current decode, no event follows."""
        self._scheduler.cancel(self._request)


class Scheduler:
    """One engine thread that owns the model's contexts.

    Attributes:
        limits: what was asked for, within what the model and llama.cpp allow.
        failure: what ended the engine thread, if something did.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        *,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.model = model
        self.limits = _possible(limits, model)
        self.failure: BaseException | None = None
        self._on_failure = on_failure
        self._counters = Counters()
        self._pieces = Pieces(model.vocabulary)
        self._wake = threading.Condition()
        self._queue: collections.deque[Request] = collections.deque()
        self._computing: Sequence[Request] = ()
        self._state = "starting"
        self._is_stopping = False
        self._context: Context | None = None
        self._stepper: Stepper | None = None
        self._tasks = SideTasks(model)
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def state(self) -> str:
        """One of "starting", "ready", "draining", "stopped", "failed"."""
        return self._state

    def start(self) -> None:
        """Open the context and start the engine thread; returns when it is ready.

        Raises:
            EngineError: a context that llama.cpp does not make, for lack of memory perhaps.
        """
        self._thread.start()
        with self._wake:
            self._wake.wait_for(lambda: self._state != "starting")
        if self.failure is not None:
            raise self.failure

    def drain(self, timeout_s: float) -> bool:
        """Refuse new jobs and wait for those there are; False if some are left."""
        with self._wake:
            if self._state == "ready":
                self._state = "draining"
            return self._wake.wait_for(
                lambda: self._state in ("failed", "stopped") or self._n_open() == 0, timeout_s
            )

    def stop(self) -> None:
        """End the thread and close the contexts; what is unanswered gets Failed(Draining)."""
        with self._wake:
            self._is_stopping = True
            if self._state == "ready":
                self._state = "draining"
            if self._context is not None:
                self._context.abort()
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, job: Job, emit: Emit, *, streamed: bool) -> Ticket:
        """Queue a job from any thread; `emit` is called on the engine thread and must not block.

        Pieces come as they are made with `streamed`, else all in one before Finished.

        Raises:
            QueueFull, ContextOverflow, Draining.
            NotFound: an adapter file that is not there.
            InvalidGrammar, EngineError: an empty prompt, or settings that are out of range.
        """
        self._refuse_impossible(job)
        key = adapter_key(job.adapters)
        self._refuse_unready()
        sampler = open_sampler(self.model, job.sampling, job.prompt, ignore_eos=job.ignore_eos)
        request = Request(job, key, sampler, emit, streamed, self._pieces)
        try:
            with self._wake:
                self._refuse_unready()
                self._queue.append(request)
                self._wake.notify_all()
        except EdgeLoRAError:
            sampler.close()
            raise
        return Ticket(self, request)

    def cancel(self, request: Request) -> None:
        """What `Ticket.cancel` does."""
        with self._wake:
            request.cancelled = True
            if request in self._queue:
                self._queue.remove(request)
                self._counters.requests["cancelled"] += 1
                request.abandon()
            batch = self._computing
            if batch and self._context is not None and all(r.cancelled for r in batch):
                # A batch of single tokens is over soon; aborted ones lose their cells.
                if not all(r.is_decoding for r in batch):
                    self._context.abort()
            self._wake.notify_all()

    def embed(
        self, texts: Sequence[tuple[int, ...]], adapters: AdapterSet, n_layers: int = 0
    ) -> Future[NDArray[np.float32]]:
        """Mean-pooled hidden states (n, d) float32, not normalised; computed between steps.

        Args:
            n_layers: see engine.embed.embed.

        Raises:
            Draining: no new work is taken.
            EngineError: a token that the vocabulary lacks.
        """
        for text in texts:
            _refuse_tokens(text, self.model)
        return self._add_task(lambda: self._tasks.embed(texts, adapters, n_layers))

    def load(self, path: Path) -> Future[None]:
        """Check and load an adapter file on the engine thread."""
        return self._add_task(lambda: self._tasks.load(path))

    def unload(self, path: Path) -> Future[None]:
        """Free an adapter when no job uses it any more; its cached prefixes are dropped."""
        return self._add_task(lambda: self._tasks.unload(path))

    def stats(self) -> Stats:
        """What is in use and what has been done; from any thread."""
        c, cells = self._counters, self._stepper.cells if self._stepper else None
        return Stats(
            queued=len(self._queue),
            running=len(self._stepper.running) if self._stepper else 0,
            n_slots=self.limits.n_slots,
            cells_used=cells.prefixes.n_used if cells else 0,
            cells_total=self.limits.n_cells,
            cached_sequences=cells.prefixes.n_finished if cells else 0,
            stored_sequences=len(cells.stored) if cells else 0,
            stored_bytes=cells.stored.n_bytes if cells else 0,
            prompt_tokens_total=c.prompt_tokens,
            generated_tokens_total=c.generated_tokens,
            cached_tokens_total=c.cached_tokens,
            prompt_s=c.prompt_s,
            generated_s=c.generated_s,
            decode_calls=c.decode_calls,
            decode_s_total=c.decode_s,
            sample_s_total=c.sample_s,
            copy_s_total=c.copy_s,
            host_s_total=c.host_s,
            rejected_total=c.rejected,
            cancelled_total=c.requests["cancelled"],
            requests=dict(c.requests),
        )

    def _n_open(self) -> int:
        running = len(self._stepper.running) if self._stepper else 0
        return len(self._queue) + running + self._tasks.n_open

    def _refuse_impossible(self, job: Job) -> None:
        if not job.prompt:
            raise EngineError("an empty prompt has no answer")
        if job.max_tokens < 0:
            raise EngineError(f"max_tokens {job.max_tokens}")
        _refuse_tokens(job.prompt, self.model)
        if len(job.prompt) + job.max_tokens > self.limits.n_ctx:
            raise ContextOverflow(len(job.prompt), job.max_tokens, self.limits.n_ctx)

    def _refuse_unready(self) -> None:
        if self._state != "ready":
            raise Draining(f"the engine takes no requests: it is {self._state}")
        running = len(self._stepper.running) if self._stepper else 0
        n_waiting = len(self._queue) + running - self.limits.n_slots
        if n_waiting >= self.limits.max_queue:
            self._counters.rejected += 1
            wait_s = (n_waiting + 1) / self.limits.n_slots * self._counters.answer_s
            raise QueueFull(float(math.ceil(min(60.0, max(1.0, wait_s)))))

    def _add_task(self, add: Callable[[], Future[T]]) -> Future[T]:
        with self._wake:
            if self._state not in ("ready", "draining") or self._is_stopping:
                raise Draining(f"the engine takes no work: it is {self._state}")
            future = add()
            self._wake.notify_all()
            return future

    def _main(self) -> None:
        try:
            with self._opened() as stepper:
                self._become("ready")
                while self._next_work(stepper):
                    self._tasks.run(stepper, self._paths_in_use)
                    stepper.release_cancelled()
                    if stepper.running:
                        stepper.step(self._publish)
                self._end(Draining("the server is ending"))
            self._become("stopped")
        except BaseException as error:  # whatever it is, nobody may wait for ever
            logger.exception("the engine thread has failed")
            self.failure = error
            self._end(EngineError("the engine has failed; the server must be started again"))
            self._become("failed")
            self._on_failure(error)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Stepper]:
        limits = self.limits
        n_sequences = limits.n_slots + limits.n_cached_sequences
        with contextlib.ExitStack() as stack:
            context = stack.enter_context(
                open_context(
                    self.model,
                    n_ctx=limits.n_ctx,
                    n_cells=limits.n_cells,
                    n_batch=limits.n_batch,
                    n_sequences=n_sequences,
                    n_outputs=max(limits.n_slots, _N_OUTPUTS),
                    kv_type=limits.kv_type,
                )
            )
            stack.callback(self._tasks.close)
            _ = self.model.vocabulary.end_tokens  # a scan, better now than in the first answer
            self._context = context
            self._stepper = Stepper(
                context, Cells(context, limits, self._counters), self._counters, adapter_key
            )
            yield self._stepper

    def _become(self, state: str) -> None:
        with self._wake:
            self._state = state
            self._wake.notify_all()

    def _next_work(self, stepper: Stepper) -> bool:
        """Wait for something to compute and give free slots away; False: the thread is to end."""
        with self._wake:
            while not self._is_stopping:
                self._admit(stepper)
                if stepper.running or self._tasks.is_ready(self._paths_in_use):
                    return True
                self._wake.notify_all()  # `drain` waits for this
                self._wake.wait()
            return False

    def _admit(self, stepper: Stepper) -> None:
        while self._queue and len(stepper.running) < self.limits.n_slots:
            stepper.admit(self._queue.popleft())
        expired_s = time.monotonic() - self.limits.queue_timeout_s
        while self._queue and self._queue[0].submitted_s < expired_s:
            request = self._queue.popleft()
            self._counters.requests["failed"] += 1
            request.fail(
                QueueTimeout(f"no slot was free for {self.limits.queue_timeout_s:g} seconds")
            )

    def _publish(self, batch: Sequence[Request]) -> bool:
        """Say whose tokens are being computed, so that cancelling all of them stops it."""
        with self._wake:
            if self._is_stopping or (batch and all(r.cancelled for r in batch)):
                self._computing = ()
                return False
            self._computing = tuple(batch)
            if self._context is not None:
                self._context.resume()
            return True

    def _paths_in_use(self) -> set[Path]:
        with self._wake:
            requests = [*self._queue, *(self._stepper.running if self._stepper else ())]
        return {adapter.path for request in requests for adapter in request.job.adapters}

    def _end(self, error: EdgeLoRAError) -> None:
        with self._wake:
            self._state = "draining" if self._is_stopping else self._state
            requests = [*(self._stepper.running if self._stepper else ()), *self._queue]
            self._queue.clear()
        for request in requests:
            if request.reason is None:
                request.fail(error)
        if self._stepper is not None:
            self._stepper.running.clear()
        self._tasks.fail(error)


def adapter_key(adapters: AdapterSet) -> Hashable:
    """What KV cells depend on besides tokens: each adapter's file, as it is now, and weight.

    Raises:
        NotFound: a file that is not there.
    """
    key = []
    for adapter in adapters:
        try:
            status = adapter.path.stat()
        except OSError as error:
            raise NotFound(f"{adapter.path}: no such adapter file") from error
        key.append((adapter.path, status.st_size, status.st_mtime_ns, adapter.weight))
    return tuple(sorted(key))


def _refuse_tokens(tokens: Sequence[int], model: Model) -> None:
    n_vocab = model.vocabulary.n_tokens
    if tokens and not (min(tokens) >= 0 and max(tokens) < n_vocab):
        raise EngineError(f"a token outside the vocabulary of {n_vocab}")


def _possible(limits: Limits, model: Model) -> Limits:
    """The limits within the model's and llama.cpp's own.

    Raises:
        EngineError: fewer than one slot or token, or more slots than one batch has tokens.
    """
    most = min(_MAX_SEQUENCES, limits.n_batch)
    if limits.n_ctx < 1 or not 1 <= limits.n_slots <= most:
        raise EngineError(
            f"{limits.n_slots} slots of {limits.n_ctx} tokens",
            hint=f"1 to {most} slots are possible (no more than tokens in one batch).",
        )
    return replace(
        limits,
        n_ctx=min(limits.n_ctx, model.n_ctx_train),
        n_cached_sequences=max(0, min(limits.n_cached_sequences, most - limits.n_slots)),
    )
