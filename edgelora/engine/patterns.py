"""A JSON Schema `pattern` as GBNF, for the inside of a JSON string.

llama_cpp's own translation lets `.` and `[^a]` match the quotation mark that ends the string, and
takes `\\d` and `\\.` for errors.
"""

from __future__ import annotations

import re
from typing import NoReturn

# Characters that JSON writes with a backslash, or that end a line for some readers, are left out.
_LEFT_OUT = (
    (0, 0x1F),
    (0x22, 0x22),
    (0x5C, 0x5C),
    (0x7F, 0x9F),
    (0x2028, 0x2029),
    (0xD800, 0xDFFF),
)
_ASCII = ((0x20, 0x7E),)
_DIGITS = ((0x30, 0x39),)
_WORD = (*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE = ((0x20, 0x20),)
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_QUANTIFIER = re.compile(r"[*+?]|\{(\d{1,6})(?:,(\d{0,6}))?\}")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|([^a-zA-Z0-9]))", re.S)

Ranges = tuple[tuple[int, int], ...]


class PatternError(ValueError):
    """A pattern that the grammar cannot enforce; the message says why."""


def pattern_to_gbnf(pattern: str, max_repetitions: int) -> str:
    """A sequence of GBNF that matches nothing that `pattern` does not.

    It may match less: no control characters, quotation marks or backslashes; `\\w`, `\\d` and `\\s`
    mean those of ASCII.

    Raises:
        PatternError: not anchored by ^ and $, look-around, back-references, lazy quantifiers,
            flags, an alternation outside of parentheses, or not a regular expression.
    """
    return _Rewriter(pattern, max_repetitions).whole()


class _Rewriter:
    def __init__(self, pattern: str, max_repetitions: int) -> None:
        self.text = pattern
        self.at = 1
        self.max_repetitions = max_repetitions

    def whole(self) -> str:
        body = re.sub(r"\\.", "", self.text, flags=re.S)
        if not self.text.startswith("^") or not body.endswith("$"):
            raise PatternError("must begin with ^ and end with $, the grammar has no search")
        written = self._sequence(depth=0)
        if self.text[self.at :] != "$":
            self._fail(f"{self.text[self.at :][:10]!r} is out of place")
        return written

    def _sequence(self, depth: int) -> str:
        if depth > 20:
            self._fail("parentheses too deep")
        pieces: list[str] = []
        while (character := self.text[self.at : self.at + 1]) not in (")", "$", ""):
            if character == "|":
                if depth == 0:
                    self._fail("an alternation outside of parentheses leaves ^ and $ to its ends")
                self.at += 1
                pieces.append("|")
                continue
            pieces.append(self._item(character, depth) + self._quantifier())
        return " ".join(pieces)

    def _item(self, character: str, depth: int) -> str:
        if character == "(":
            return self._group(depth)
        if character == "[":
            return self._class()
        if character == "\\":
            return _written(self._escape(), self)
        self.at += 1
        if character == ".":
            return _written(_complement(()), self)
        if character in "*+?{^":
            self._fail(f"{character} is out of place")
        if character.isascii() and character.isalnum():
            return f'"{character}"'
        return _written(((ord(character), ord(character)),), self)

    def _group(self, depth: int) -> str:
        self.at += 1
        if self.text.startswith("?", self.at):
            if not self.text.startswith("?:", self.at):
                self._fail("look-around, flags and named groups are not enforced")
            self.at += 2
        inside = self._sequence(depth + 1)
        if not self.text.startswith(")", self.at):
            self._fail("a parenthesis without its end")
        self.at += 1
        return f"({inside})"

    def _class(self) -> str:
        self.at += 1
        negated = self.text.startswith("^", self.at)
        self.at += negated
        ranges: list[tuple[int, int]] = []
        while not self.text.startswith("]", self.at):
            first = self._class_item()
            if self.text.startswith("-", self.at) and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                last = self._class_item()
                if not _is_single(first) or not _is_single(last) or last < first:
                    self._fail("a range between things that are no characters, or backwards")
                first = ((first[0][0], last[0][0]),)
            ranges.extend(first)
        self.at += 1
        return _written(_complement(ranges) if negated else tuple(ranges), self)

    def _class_item(self) -> Ranges:
        character = self.text[self.at : self.at + 1]
        if not character:
            self._fail("a [ without its end")
        if character == "\\":
            return self._escape()
        self.at += 1
        return ((ord(character), ord(character)),)

    def _escape(self) -> Ranges:
        name = self.text[self.at + 1 : self.at + 2]
        if name and name in "dws":
            self.at += 2
            return _CLASSES[name]
        if name and name in "DWS":
            self.at += 2
            return _intersection(_ASCII, _complement(_CLASSES[name.lower()]))
        match = _ESCAPE.match(self.text, self.at)
        if match is None:
            self._fail(f"\\{name} is not enforced")
        self.at = match.end()
        digits = match[1] or match[2]
        code = int(digits, 16) if digits else ord(match[3])
        return ((code, code),)

    def _quantifier(self) -> str:
        match = _QUANTIFIER.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        if self.text[self.at : self.at + 1] in tuple("*+?{"):
            self._fail("lazy, possessive and doubled quantifiers are not enforced")
        numbers = [int(number) for number in match.groups() if number]
        if max(numbers, default=0) > self.max_repetitions or sorted(numbers) != numbers:
            self._fail(f"{match[0]} counts past {self.max_repetitions}, or backwards")
        return match[0]

    def _fail(self, what: str) -> NoReturn:
        raise PatternError(f"{what} (at character {self.at + 1})")


def _is_single(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]


def _complement(ranges: Ranges | list[tuple[int, int]]) -> Ranges:
    kept, free = [], 0
    for first, last in [*sorted(ranges), (0x110000, 0x110000)]:
        if free < first:
            kept.append((free, first - 1))
        free = max(free, last + 1)
    return tuple(kept)


def _intersection(one: Ranges, other: Ranges) -> Ranges:
    pairs = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return tuple(sorted((first, last) for first, last in pairs if first <= last))


def _written(ranges: Ranges, rewriter: _Rewriter) -> str:
    """The ranges as a class of GBNF."""
    kept = _intersection(_complement(_complement(ranges)), _complement(_LEFT_OUT))
    if not kept:
        rewriter._fail("only characters that JSON writes with a backslash would match")
    return "[" + "".join(_ends(first, last) for first, last in kept) + "]"


def _ends(first: int, last: int) -> str:
    return _code(first) if first == last else f"{_code(first)}-{_code(last)}"


def _code(code: int) -> str:
    return f"\\x{code:02X}" if code < 0x100 else f"\\U{code:08X}"
