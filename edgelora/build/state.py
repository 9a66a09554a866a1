"""The state of gradient steps beside the output: it lets an interrupted build go on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgelora.build.work import Work
from edgelora.gradient.checkpoint import fingerprint


@dataclass(frozen=True)
class State:
    """A folder that appears with the first thing that is kept in it."""

    folder: Path

    def path(self, what: str, *parts: object) -> Path:
        """The file of one descent; `parts` are all that decides its course."""
        return self.folder / f"{what}-{fingerprint(*parts)[:16]}.safetensors"


@contextlib.contextmanager
def open_state(work: Work) -> Iterator[State]:
    """`<out>.refine`, removed at the end; kept, and that is said, when the block is left early."""
    folder = work.out.with_name(f"{work.out.name}.refine")
    try:
        yield State(folder)
    except BaseException:
        if folder.is_dir() and any(folder.iterdir()):
            work.warn(
                f"{folder}: keeps the gradient steps made so far; the same command goes on from "
                "there (delete it to begin anew)"
            )
        raise
    if folder.is_dir():
        shutil.rmtree(folder)
