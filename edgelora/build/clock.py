"""Where the time of a build goes: seconds by stage, and what the plan had estimated."""

from __future__ import annotations

import time
from dataclasses import replace

from edgelora.build.records import Listener, Plan

OTHER = "the rest"


class Clock:
    """Passes on what a listener is told, and times it.

    The time before a report is that of its stage; before a stage's first report, of no steps done,
    it is that of `OTHER`.

    Attributes:
        listener: to tell; what it is told reaches the listener given.
        plan: the last plan told, None before.
        planned_s: seconds from the start until then.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = replace(listener, plan=self._planned, progress=self._progress)
        self.plan: Plan | None = None
        self.planned_s = 0.0
        self._told = listener
        self._seconds: dict[str, float] = {}
        self._started = self._last = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def stages(self) -> dict[str, float]:
        """Seconds by stage so far; they add up to the time since the start."""
        self._pass(OTHER)
        return dict(self._seconds)

    def _planned(self, plan: Plan) -> None:
        self.plan, self.planned_s = plan, self.elapsed_s
        self._told.plan(plan)

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._pass(stage if done else OTHER)
        self._told.progress(stage, done, total)

    def _pass(self, stage: str) -> None:
        now = time.monotonic()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now
