"""A build: from a dataset and a bank to one adapter, chosen by its loss on the examples."""

from __future__ import annotations

from edgelora.build.described import build_described
from edgelora.build.records import Built, Listener, Options, Plan
from edgelora.build.run import build

__all__ = ["Built", "Listener", "Options", "Plan", "build", "build_described"]
