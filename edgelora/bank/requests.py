"""Adapter folders to requests: each with its dataset and the card that lies beside it."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from edgelora.bank.adding import REFUSED, Outcome, Request
from edgelora.bank.records import Facts
from edgelora.errors import DatasetError, EdgeLoRAError, InvalidFile, NotFound

# `task` is what scripts/train_bank.py calls the name.
_NAME_KEYS = ("name", "task")


def make_requests(
    folders: Iterable[Path],
    *,
    name: str | None = None,
    data: Path | None = None,
    data_glob: str | None = None,
    card_glob: str | None = None,
    facts: Facts | None = None,
) -> tuple[list[Request], list[Outcome]]:
    """What to add, and what is refused because its card or dataset cannot be told.

    Args:
        data_glob, card_glob: patterns in which {parent}, {folder} and {name} stand for the parent,
            the folder itself and the folder's name; each must match one file, but a card may be
            absent.
        facts: go before what a card says. A card is a JSON object with any of name (or task),
            source, category, licence, description, template; a value is text or a list of texts.
    """
    requests: list[Request] = []
    refused: list[Outcome] = []
    for folder in folders:
        try:
            card_name, known = _read_card(folder, card_glob, facts or Facts())
            found = data if data is not None else find_file(folder, data_glob)
            if data_glob and found is None:
                raise DatasetError(
                    f"{folder}: no dataset matches {data_glob}",
                    hint="Add it without --data-glob: operators that need a signature skip it.",
                )
            requests.append(Request(folder, name or card_name, found, known))
        except EdgeLoRAError as error:
            refused.append(Outcome(folder, REFUSED, reason=str(error)))
    return requests, refused


def _read_card(folder: Path, pattern: str | None, given: Facts) -> tuple[str | None, Facts]:
    path = find_file(folder, pattern)
    if path is None:
        return None, given
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFile(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(card, dict):
        raise InvalidFile(f"{path}: not a JSON object")
    keys = [field.name for field in fields(Facts)]
    texts = {key: _text(path, key, card[key]) for key in (*keys, *_NAME_KEYS) if key in card}
    missing = {key: texts[key] for key in keys if key in texts and getattr(given, key) is None}
    name = next((texts[key] for key in _NAME_KEYS if key in texts), None)
    return name, replace(given, **missing)


def _text(path: Path, key: str, value: object) -> str:
    parts: Sequence[object] = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise InvalidFile(f"{path}: {key} is neither a text nor a list of texts")
    text = ", ".join(str(part) for part in parts)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidFile(f"{path}: {key} is not valid Unicode (a lone surrogate)")
    return text


def find_file(folder: Path, pattern: str | None) -> Path | None:
    """The one file that a pattern means for this folder; None if there is none."""
    if pattern is None:
        return None
    whole = folder.resolve()
    words = {"parent": str(whole.parent), "folder": str(whole), "name": whole.name}
    try:
        filled = pattern.format(**{key: glob.escape(word) for key, word in words.items()})
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise NotFound(
            f"{pattern}: only {{parent}}, {{folder}} and {{name}} may stand in braces"
        ) from error
    found = sorted(glob.glob(filled, recursive=True))
    if len(found) > 1:
        raise NotFound(f"{folder}: {len(found)} files match {pattern}", problems=found[:10])
    return Path(found[0]) if found else None
