"""The jobs of one request, against a scheduler whose every step the test takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from edgelora.errors import EngineError
from edgelora.serve.generation import Generation
from edgelora.serve.jobs import (
    Event,
    Failed,
    Finished,
    Job,
    Limits,
    Piece,
    Prefilled,
    QueueFull,
    QueueTimeout,
    Timings,
)
from edgelora.serve.streaming import ClientGone, EventStream, data, until_gone

A, B = Job(prompt=(1, 2)), Job(prompt=(3,))
PREFILLED = Prefilled(2, 1)
FINISHED = Finished("stop", None, 2, 1, 3, Timings(0.0, 0.0, 0.0))


@dataclass
class Ticket:
    job: Job
    emit: Callable[[Event], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Steps:
    """A scheduler with `room` places; a place that was taken is not given back."""

    n_slots: int = 2
    room: int = 100
    tickets: list[Ticket] = field(default_factory=list)

    @property
    def limits(self) -> Limits:
        return Limits(n_slots=self.n_slots)

    def submit(self, job: Job, emit: Callable[[Event], None], *, streamed: bool) -> Ticket:
        if len(self.tickets) >= self.room:
            raise QueueFull(1.0)
        self.tickets.append(Ticket(job, emit))
        return self.tickets[-1]


async def settle() -> None:
    """Let the loop run what is ready."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 10))


def test_the_first_answer_computes_the_prompt_and_the_others_follow() -> None:
    async def scenario() -> None:
        steps = Steps(n_slots=8)
        generation = Generation(steps, [[A, A, A]], streamed=True)
        generation.start()
        collecting = asyncio.create_task(generation.collect())
        await settle()
        assert len(steps.tickets) == 1
        steps.tickets[0].emit(PREFILLED)
        await settle()
        assert len(steps.tickets) == 3
        for number, ticket in enumerate(steps.tickets):
            if number:
                ticket.emit(Prefilled(2, 2))
            ticket.emit(Piece(f"answer {number}"))
            ticket.emit(FINISHED)
        outcomes = await collecting
        assert [outcome.text for outcome in outcomes] == ["answer 0", "answer 1", "answer 2"]
        usage = generation.usage()
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 9)
        assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
        assert not any(ticket.cancelled for ticket in steps.tickets)

    run(scenario())


def test_one_request_takes_no_more_places_than_there_are_slots() -> None:
    async def scenario() -> None:
        steps = Steps(n_slots=2)
        generation = Generation(steps, [[A], [B], [A], [B]], streamed=False)
        generation.start()
        collecting = asyncio.create_task(generation.collect())
        await settle()
        assert len(steps.tickets) == 2
        for number in range(4):
            steps.tickets[number].emit(PREFILLED)
            steps.tickets[number].emit(Piece(str(number)))
            steps.tickets[number].emit(FINISHED)
            await settle()
            assert len(steps.tickets) == min(4, number + 3)
        assert [outcome.text for outcome in await collecting] == ["0", "1", "2", "3"]

    run(scenario())


def test_a_full_queue_delays_later_answers_and_refuses_the_first() -> None:
    async def scenario() -> None:
        steps = Steps(room=0)
        with pytest.raises(QueueFull):
            Generation(steps, [[A]], streamed=True).start()
        steps.room = 1
        generation = Generation(steps, [[A], [B]], streamed=True)
        generation.start()
        collecting = asyncio.create_task(generation.collect())
        await settle()
        assert len(steps.tickets) == 1
        steps.room = 2
        steps.tickets[0].emit(PREFILLED)
        steps.tickets[0].emit(FINISHED)
        await settle()
        assert len(steps.tickets) == 2
        steps.tickets[1].emit(FINISHED)
        await collecting

    run(scenario())


def test_a_failure_cancels_the_rest() -> None:
    async def scenario() -> None:
        steps = Steps()
        generation = Generation(steps, [[A], [B]], streamed=True)
        generation.start()
        steps.tickets[0].emit(Failed(QueueTimeout("too long")))
        with pytest.raises(QueueTimeout):
            await generation.collect()
        assert steps.tickets[1].cancelled

    run(scenario())


def test_an_event_after_the_end_of_the_loop_is_dropped() -> None:
    steps = Steps()

    async def scenario() -> None:
        Generation(steps, [[A]], streamed=True).start()

    run(scenario())
    steps.tickets[0].emit(PREFILLED)


def test_work_ends_when_the_client_leaves() -> None:
    ended: list[str] = []

    async def endless() -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")
        return b""

    async def leaves() -> dict[str, Any]:
        await settle()
        return {"type": "http.disconnect"}

    async def scenario() -> None:
        with pytest.raises(ClientGone):
            await until_gone(leaves, endless())

    run(scenario())
    assert ended == ["work"]


def test_what_work_raises_is_raised() -> None:
    async def failing() -> None:
        raise EngineError("broken")

    async def stays() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    with pytest.raises(EngineError, match="broken"):
        run(until_gone(stays, failing()))


@pytest.mark.parametrize("left", [False, True])
def test_a_stream_is_closed_however_it_ends(left: bool) -> None:
    sent: list[dict[str, Any]] = []
    closed: list[str] = []

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        await settle()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def events() -> Any:
        try:
            yield data({"text": "é"})
            if left:
                await asyncio.Event().wait()
        finally:
            closed.append("events")

    async def scenario() -> None:
        stream = EventStream(events(), lambda: closed.append("stream"), {"X-A": "b"})
        await stream({"type": "http"}, receive, send)

    run(scenario())
    assert closed == ["events", "stream"]
    assert sent[0]["status"] == 200
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-a"] == b"b" and b"content-length" not in headers
    assert sent[1]["body"] == 'data: {"text":"é"}\n\n'.encode()
    assert len(sent) == (2 if left else 3)
