"""Where the time of a build goes."""

from __future__ import annotations

import pytest

from edgelora.build.clock import OTHER, Clock
from edgelora.build.records import Listener


def test_time_before_a_report_is_that_of_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [10.0], []
    monkeypatch.setattr("edgelora.build.clock.time.monotonic", lambda: now[0])
    clock = Clock(Listener(progress=lambda *step: told.append(step)))
    for seconds, stage, done in ((1, "measuring", 0), (2, "measuring", 1), (4, "measuring", 2),
                                 (8, "merging", 0), (16, "merging", 3)):  # fmt: skip
        now[0] += seconds
        clock.listener.progress(stage, done, 3)
    now[0] += 32
    assert clock.stages() == {"measuring": 6.0, "merging": 16.0, OTHER: 1 + 8 + 32}
    assert told == [("measuring", 0, 3), ("measuring", 1, 3), ("measuring", 2, 3),
                    ("merging", 0, 3), ("merging", 3, 3)]  # fmt: skip
    assert clock.plan is None
