"""The part of Go's text/template and of Ollama's Modelfile that exports use, read by another rule.

Ollama (template/template.go) merges turns of one role and gives the template `.Messages`;
(parser/parser.go) reads a value up to the first line end at which its quotes are closed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from edgelora.datasets.records import Message

_TOKENS = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def render_go(source: str, messages: Sequence[Message]) -> str:
    """What Ollama sends to its runner for these turns."""
    pieces = _TOKENS.split(source)
    assert pieces[0] == "" and pieces[1] == "range $i, $_ := .Messages"
    assert pieces[-1] == "" and pieces[-2] == "end"
    return "".join(_turn(pieces[2:-2], i, messages) for i in range(len(messages)))


def _turn(pieces: Sequence[str], i: int, messages: Sequence[Message]) -> str:
    written, open_ifs = "", []  # of each open `if`: whether it writes now, whether it has written
    for position, piece in enumerate(pieces):
        writes = all(now for now, _ in open_ifs)
        if position % 2 == 0:
            written += piece if writes else ""
        elif piece == "$last := eq (len (slice $.Messages $i)) 1":
            continue
        elif piece == "end":
            open_ifs.pop()
        elif piece.startswith("else if "):
            done = any(open_ifs.pop())
            now = not done and _holds(piece.removeprefix("else if "), i, messages)
            open_ifs.append((now, done or now))
        elif piece.startswith("if "):
            now = _holds(piece.removeprefix("if "), i, messages)
            open_ifs.append((now, now))
        elif writes:
            written += messages[i].content if piece == ".Content" else _string(piece)
    assert not open_ifs
    return written


def _holds(condition: str, i: int, messages: Sequence[Message]) -> bool:
    if condition == "not $last":
        return len(messages[i:]) != 1
    if condition == "eq $i 0":
        return i == 0
    role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    assert role is not None, condition
    return messages[i].role == role[1]


def _string(literal: str) -> str:
    assert re.fullmatch(r'"(\{|\\"|\\U[0-9a-f]{8})"', literal), literal
    if literal.startswith('"\\U'):
        return chr(int(literal[3:-1], 16))
    text: str = json.loads(literal)
    return text


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The commands and their values."""
    found = []
    lines = iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        command, _, value = line.partition(" ")
        if command == "PARAMETER":
            name, _, value = value.partition(" ")
            command = f"{command} {name}"
        while (whole := _unquoted(value.strip())) is None:
            value += "\n" + next(lines)
        found.append((command, whole))
    return found


def _unquoted(value: str) -> str | None:
    for mark in ('"""', '"'):
        if value.startswith(mark):
            closed = value.endswith(mark) and len(value) >= 2 * len(mark)
            return value[len(mark) : -len(mark)] if closed else None
    return value
