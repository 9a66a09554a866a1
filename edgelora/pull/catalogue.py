"""The seam to the catalogue of public adapters: its entries, and those nearest to a dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelora.datasets.records import Example
from edgelora.errors import InvalidFile, NotFound


@dataclass(frozen=True)
class Entry:
    """One public adapter: a task of Super-NaturalInstructions with its repositories on the Hub."""

    task: str
    adapter: str
    dataset: str
    source: tuple[str, ...]
    category: tuple[str, ...]
    licence: tuple[str, ...]


def entries() -> list[Entry]:
    """Every adapter of the catalogue."""
    path = _path()
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [_entry(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidFile(f"{path}: not the catalogue of adapters ({error})") from error


def nearest_entries(
    examples: Sequence[Example], top: int, seed: int = 0
) -> tuple[list[Entry], list[Entry]]:
    """The `top` adapters whose data is nearest to a dataset, nearest first; those not compared."""
    raise NotFound("--for: the ranking of the catalogue is not part of this version yet")


def _path() -> Path:
    return Path(__file__).parent.parent.parent / "models" / "catalogue" / "lots-of-loras.jsonl"


def _entry(row: dict[str, object]) -> Entry:
    task, adapter, dataset = (str(row[key]) for key in ("task", "adapter", "dataset"))
    texts = [row.get(key, []) for key in ("source", "category", "licence")]
    listed = [tuple(map(str, values)) if isinstance(values, list) else () for values in texts]
    return Entry(task, adapter, dataset, *listed)
