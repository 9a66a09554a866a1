"""The engine thread: many requests in one llama.cpp context, by continuous batching."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.model import Model
from edgelora.serve.jobs import AdapterSet, Event, Job, Limits

Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Stats:
    """Counters since the start, and what is in use now.

    Attributes:
        cells_used: KV cells that hold tokens, of running and of finished requests.
        prompt_tokens_total: computed prompt tokens; those taken from the cache are not in it.
        prompt_s, generated_s: seconds of the requests' prompts and answers, summed.
        decode_calls, decode_s_total: llama_decode, whose time is not in host_s_total.
        host_s_total: Python's share of the steps: filling batches, texts, events.
        requests: finished ones by reason: "stop", "length", "failed", "cancelled".
    """

    queued: int = 0
    running: int = 0
    n_slots: int = 0
    cells_used: int = 0
    cells_total: int = 0
    cached_sequences: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    cached_tokens_total: int = 0
    prompt_s: float = 0.0
    generated_s: float = 0.0
    decode_calls: int = 0
    decode_s_total: float = 0.0
    sample_s_total: float = 0.0
    host_s_total: float = 0.0
    rejected_total: int = 0
    cancelled_total: int = 0
    requests: dict[str, int] = field(default_factory=dict)


class Ticket:
    """A submitted job; `cancel` is all that can be done to it."""

    def cancel(self) -> None:
        """Give the answer up: its slot is free after the current decode, no event follows."""
        raise NotImplementedError


class Scheduler:
    """One engine thread that owns the model's contexts.

    Attributes:
        failure: what ended the engine thread, if something did.
    """

    failure: BaseException | None

    def __init__(
        self,
        model: Model,
        limits: Limits,
        *,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.model = model
        self.limits = limits

    @property
    def state(self) -> str:
        """ "starting", "ready", "draining", "stopped" or "failed"."""
        raise NotImplementedError

    def start(self) -> None:
        """Open the context and start the engine thread; returns when it is ready."""
        raise NotImplementedError

    def drain(self, timeout_s: float) -> bool:
        """Refuse new jobs and wait for those there are; False if some are left."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the thread; what is not answered yet gets Failed(Draining)."""
        raise NotImplementedError

    def submit(self, job: Job, emit: Emit, *, streamed: bool) -> Ticket:
        """Queue a job from any thread; `emit` is called on the engine thread and must not block.

        Raises:
            QueueFull, ContextOverflow, Draining.
            NotFound: an adapter file that is not there.
            EngineError: an empty prompt, or settings that are out of range.
        """
        raise NotImplementedError

    def embed(
        self, texts: Sequence[tuple[int, ...]], adapters: AdapterSet
    ) -> concurrent.futures.Future[NDArray[np.float32]]:
        """Mean-pooled hidden states (n, d) float32, not normalised; computed between steps."""
        raise NotImplementedError

    def load(self, path: Path) -> concurrent.futures.Future[None]:
        """Check and load an adapter file on the engine thread."""
        raise NotImplementedError

    def unload(self, path: Path) -> concurrent.futures.Future[None]:
        """Free an adapter when no job uses it any more; its cached prefixes are dropped."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """What is in use and what has been done; from any thread."""
        raise NotImplementedError
