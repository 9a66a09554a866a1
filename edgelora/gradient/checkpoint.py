"""The state of a descent, and how it is kept on disk so that a descent can go on later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edgelora.errors import InvalidFile
from edgelora.gradient.adam import Track
from edgelora.gradient.weights import Array

FORMAT_VERSION = 3
_METADATA_KEY = "edgelora.descent"
_PARTS = ("values", "mean", "square", "average")
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Tally:
    """Where a descent stands, and what it has seen.

    Attributes:
        in_pass, unit: what comes next (see folds.units_of_pass).
        best_pass: the pass whose values are the best so far.
        support: (nats, completion tokens) met in the unfinished pass; held_out: the same.
        support_losses: met in each pass, before each step.
        held_out_losses: at the start and after each pass; empty without folds.
        n_tokens: forward-equivalent tokens: a gradient pass counts three.
    """

    in_pass: int = 0
    unit: int = 0
    best_pass: int = 0
    support: tuple[float, int] = (0.0, 0)
    held_out: tuple[float, int] = (0.0, 0)
    support_losses: tuple[float, ...] = ()
    held_out_losses: tuple[float, ...] = ()
    n_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a descent needs to go on.

    Attributes:
        key: says of which descent it is: `fingerprint` of everything that decides its course.
        best: (n,) for each track, the averages to return if it ends here.
    """

    key: str
    tracks: tuple[Track, ...]
    best: tuple[Array, ...]
    tally: Tally = field(default_factory=Tally)

    def to_bytes(self) -> bytes:
        """As a safetensors file; the same state gives the same bytes."""
        from safetensors.numpy import save

        arrays = {}
        for number, (track, best) in enumerate(zip(self.tracks, self.best, strict=True)):
            arrays[f"best.{number}"] = best
            for part in _PARTS:
                arrays[f"{part}.{number}"] = getattr(track, part)
        facts = {
            "version": FORMAT_VERSION,
            "key": self.key,
            "n_steps": [track.n_steps for track in self.tracks],
            "tally": asdict(self.tally),
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return save(arrays, metadata={_METADATA_KEY: json.dumps(facts, sort_keys=True)})


def from_bytes(data: bytes, where: str = "checkpoint") -> Checkpoint:
    """Read what `to_bytes` wrote.

    Args:
        where: the file's name, for the error.

    Raises:
        InvalidFile: damaged, or of another version.
    """
    try:
        return _parse(data)
    except _MALFORMED as error:
        raise InvalidFile(
            f"{where}: not a sound state of a descent",
            problems=[f"{type(error).__name__}: {error}"],
            hint="Delete it; the descent then begins anew.",
        ) from error


def fingerprint(*parts: object) -> str:
    """A hash of everything that decides the course of a descent; arrays count by their bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _parse(data: bytes) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = json.loads(header["__metadata__"][_METADATA_KEY])
    if facts["version"] != FORMAT_VERSION:
        raise ValueError(f"format version {facts['version']}; this program reads {FORMAT_VERSION}")
    best, tracks = [], []
    for number, n_steps in enumerate(int(n) for n in facts["n_steps"]):
        best.append(arrays[f"best.{number}"])
        parts = {part: arrays[f"{part}.{number}"] for part in _PARTS}
        tracks.append(Track(**parts, n_steps=n_steps))
        if any(
            (p.shape, p.dtype) != (best[0].shape, best[0].dtype)
            for p in (best[-1], *parts.values())
        ):
            raise ValueError(f"track {number} has other shapes than the first")
    return Checkpoint(str(facts["key"]), tuple(tracks), tuple(best), _tally(facts["tally"]))


def _tally(facts: dict[str, Any]) -> Tally:
    def numbers(values: Sequence[Any]) -> tuple[float, ...]:
        return tuple(float(value) for value in values)

    return Tally(
        in_pass=int(facts["in_pass"]),
        unit=int(facts["unit"]),
        best_pass=int(facts["best_pass"]),
        support=(float(facts["support"][0]), int(facts["support"][1])),
        held_out=(float(facts["held_out"][0]), int(facts["held_out"][1])),
        support_losses=numbers(facts["support_losses"]),
        held_out_losses=numbers(facts["held_out_losses"]),
        n_tokens=int(facts["n_tokens"]),
    )
