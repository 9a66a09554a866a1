"""The jobs of one request: submitted as places come free, followed together, cancelled together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgelora.serve.jobs import (
    Event,
    Failed,
    Finished,
    Job,
    Limits,
    Piece,
    Prefilled,
    QueueFull,
    TokenLogprob,
)
from edgelora.serve.scheduler import Emit, Ticket


class Submitter(Protocol):
    """What a generation needs of the scheduler."""

    limits: Limits

    def submit(self, job: Job, emit: Emit, *, streamed: bool) -> Ticket: ...


@dataclass
class Outcome:
    """One choice, as far as it has come."""

    prefilled: Prefilled | None = None
    pieces: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.pieces)

    def note(self, event: Event) -> None:
        """Take an event in."""
        if isinstance(event, Piece):
            self.pieces.append(event.text)
            self.tokens += event.tokens
        elif isinstance(event, Prefilled):
            self.prefilled = event
        elif isinstance(event, Finished):
            self.finished = event


class Generation:
    """The choices of one request: several answers (`n`) to each of its prompts.

    The first answer to a prompt computes it. The others are submitted once that is done, so that
    they find it in the scheduler's cache. One request has no more jobs in the queue than there
    are slots: a list of a thousand prompts does not shut everybody else out.

    Args:
        prompts: for each prompt the jobs of its answers; choices are numbered in this order.
    """

    def __init__(
        self, scheduler: Submitter, prompts: Sequence[Sequence[Job]], *, streamed: bool
    ) -> None:
        self._scheduler = scheduler
        self._streamed = streamed
        self._jobs = [job for jobs in prompts for job in jobs]
        self._ready: deque[int] = deque()
        self._followers: dict[int, list[int]] = {}
        self._tickets: dict[int, Ticket] = {}
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._group_sizes = [len(jobs) for jobs in prompts]
        first = 0
        for size in self._group_sizes:
            self._ready.append(first)
            self._followers[first] = list(range(first + 1, first + size))
            first += size
        self.outcomes = [Outcome() for _ in self._jobs]

    def start(self) -> None:
        """Submit what can be submitted at once.

        Raises:
            QueueFull, Draining, ContextOverflow: as `Scheduler.submit`.
        """
        self._submit()

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Every event of every choice with the choice's number, until all have finished.

        Raises:
            EdgeLoRAError: a job has failed; the others are cancelled.
        """
        try:
            while self._tickets:
                index, event = await self._events.get()
                if isinstance(event, Failed):
                    raise event.error
                self._advance(index, event)
                yield index, event
        finally:
            self.cancel()

    async def collect(self) -> list[Outcome]:
        """All choices, once they are finished."""
        async with contextlib.aclosing(self.events()) as events:
            async for _ in events:
                pass
        return self.outcomes

    def cancel(self) -> None:
        """Give up what has not finished; harmless when all has."""
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets.clear()
        self._ready.clear()

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts: each prompt once, however many answers it has."""
        leaders = [0]
        for size in self._group_sizes[:-1]:
            leaders.append(leaders[-1] + size)
        prefilled = [p for i in leaders if (p := self.outcomes[i].prefilled) is not None]
        n_prompt = sum(p.n_prompt for p in prefilled)
        n_generated = sum(o.finished.n_generated for o in self.outcomes if o.finished is not None)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
            "prompt_tokens_details": {"cached_tokens": sum(p.n_cached for p in prefilled)},
        }

    def _advance(self, index: int, event: Event) -> None:
        self.outcomes[index].note(event)
        if isinstance(event, Prefilled):
            self._ready.extendleft(reversed(self._followers.pop(index, [])))
        elif isinstance(event, Finished):
            del self._tickets[index]
        else:
            return
        self._submit()

    def _submit(self) -> None:
        while self._ready and len(self._tickets) < self._scheduler.limits.n_slots:
            index = self._ready[0]
            emit = functools.partial(_hand_over, asyncio.get_running_loop(), self._events, index)
            try:
                ticket = self._scheduler.submit(self._jobs[index], emit, streamed=self._streamed)
            except QueueFull:
                if self._tickets:
                    return  # tried again when one of ours has finished
                raise
            self._ready.popleft()
            self._tickets[index] = ticket


def _hand_over(
    loop: asyncio.AbstractEventLoop,
    events: asyncio.Queue[tuple[int, Event]],
    index: int,
    event: Event,
) -> None:
    """Pass an event from the engine thread on; a loop that has ended has nobody to tell."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(events.put_nowait, (index, event))
