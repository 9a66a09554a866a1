"""From a dataset to public adapters for it: a catalogue of what they were trained on, compared."""

from __future__ import annotations

from edgelora.suggest.nearest import Nearest, Suggestions, suggest

__all__ = ["Nearest", "Suggestions", "suggest"]
