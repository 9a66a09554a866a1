"""A scheduler on a pico model, and the events of its requests gathered."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from dataclasses import dataclass, field

from edgelora.engine.model import Model
from edgelora.serve.jobs import (
    Event,
    Failed,
    Finished,
    Job,
    Limits,
    Piece,
    Prefilled,
    TokenLogprob,
)
from edgelora.serve.scheduler import Scheduler, Ticket

WAIT_S = 60


@contextlib.contextmanager
def scheduling(model: Model, **limits: object) -> Iterator[Scheduler]:
    """A started scheduler; F32 cells so that texts are equal whatever shared a batch."""
    settings: dict[str, object] = {"n_slots": 4, "n_ctx": 128, "kv_type": "f32"} | limits
    scheduler = Scheduler(model, Limits(**settings))  # type: ignore[arg-type]
    scheduler.start()
    try:
        yield scheduler
        assert scheduler.failure is None
    finally:
        scheduler.stop()


@dataclass
class Answer:
    """The events of one request; `wait` until the last one."""

    ticket: Ticket | None = None
    events: list[Event] = field(default_factory=list)
    _queue: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)

    def emit(self, event: Event) -> None:
        self._queue.put(event)

    def next(self) -> Event:
        event = self._queue.get(timeout=WAIT_S)
        self.events.append(event)
        return event

    def wait(self) -> Answer:
        while not self.events or not isinstance(self.events[-1], Finished | Failed):
            self.next()
        return self

    def is_silent(self) -> bool:
        return self._queue.empty()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.pieces)

    @property
    def pieces(self) -> list[Piece]:
        return [event for event in self.events if isinstance(event, Piece)]

    @property
    def tokens(self) -> list[TokenLogprob]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def prefilled(self) -> Prefilled:
        (event,) = [event for event in self.events if isinstance(event, Prefilled)]
        return event

    @property
    def finished(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]

    @property
    def failed(self) -> Failed:
        assert isinstance(self.events[-1], Failed), self.events[-1]
        return self.events[-1]


def submit(scheduler: Scheduler, job: Job, *, streamed: bool = True) -> Answer:
    """Queue a job."""
    answer = Answer()
    answer.ticket = scheduler.submit(job, answer.emit, streamed=streamed)
    return answer


def ask(scheduler: Scheduler, job: Job, *, streamed: bool = True) -> Answer:
    """Queue a job and wait for its end."""
    return submit(scheduler, job, streamed=streamed).wait()
