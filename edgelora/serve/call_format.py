"""How a model writes the call of a tool: as its chat template does, or as plain JSON."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass

from edgelora.datasets.conversation import PROBE_TOOL
from edgelora.datasets.template import Template
from edgelora.errors import TemplateError

_NAME = "edgelora_probe"
_CALL = {"id": "a00000000", "function": {"name": _NAME, "arguments": '{"text": "x"}'}}
_OPENING = re.compile(r"(<[^<>\s]{2,40}>)\s*$")
_CLOSING = re.compile(r"\s*</[^<>\s]{2,40}>")


@dataclass(frozen=True)
class CallFormat:
    """What surrounds the JSON of calls: opening, JSON, between, JSON, ..., closing.

    Attributes:
        marker: the tag that the opening begins with; "" for plain JSON, or a list of it.
        key: what the arguments are called in the JSON.
    """

    marker: str = ""
    opening: str = ""
    between: str = "\n"
    closing: str = ""
    key: str = "arguments"

    @property
    def beginning(self) -> str:
        """What every call begins with, and no other answer."""
        return self.marker or self.opening + "{"


@functools.lru_cache(maxsize=8)
def find_call_format(template: Template) -> CallFormat:
    """The format that the template writes calls in.

    Recognised are JSON objects of a name and arguments (or parameters), with a tag such as
    `<tool_call>` before them, or in a list, or alone. Where a template has another notation, calls
    are plain JSON; a control token before them (Mistral's) is left out: grammars have none.
    """
    if not template.takes_tools:
        return CallFormat()
    one = _written(template, 1)
    if one is None:
        return CallFormat()
    (found,) = one.calls
    before, behind = one.text[: found.start], one.text[found.end :]
    opening, tag = _OPENING.search(before), _CLOSING.match(behind)
    two = _written(template, 2)
    between = two.text[two.calls[0].end : two.calls[1].start] if two else None
    if opening is not None:
        closing = tag[0] if tag else ""
        between = between or f"{closing}\n{opening[0]}"
        return CallFormat(opening[1], opening[0], between, closing, found.key)
    if before.endswith("[") and behind.startswith("]"):
        return CallFormat("", "[", between or ", ", "]", found.key)
    return CallFormat(key=found.key)


@dataclass(frozen=True)
class _Found:
    start: int
    end: int
    key: str


@dataclass(frozen=True)
class _Written:
    text: str
    calls: tuple[_Found, ...]


def _written(template: Template, n_calls: int) -> _Written | None:
    """The text, free of control tokens, in which the template writes calls; None without one."""
    user = {"role": "user", "content": "x"}
    answer = {"role": "assistant", "content": None, "tool_calls": [_CALL] * n_calls}
    try:
        segments = template.answer_segments([user], answer, [PROBE_TOOL])
    except TemplateError:
        return None
    for segment in segments or ():
        calls = () if segment.control else _calls_in(segment.text)
        if len(calls) == n_calls:
            return _Written(segment.text, calls)
    return None


def _calls_in(text: str) -> tuple[_Found, ...]:
    found, at = [], 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            at += 1
            continue
        keys = [key for key in ("arguments", "parameters") if value.get(key) == {"text": "x"}]
        if value.get("name") == _NAME and keys and list(value)[:2] == ["name", keys[0]]:
            found.append(_Found(at, end, keys[0]))
        at = end
    return tuple(found)
