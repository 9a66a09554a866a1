"""A grammar in GBNF, checked before llama.cpp reads it: its parser can hang or end the process."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import NoReturn

from edgelora.engine.gbnf_growth import Alternative, Ranges, Text
from edgelora.engine.gbnf_rules import Rules, find_problem
from edgelora.errors import InvalidGrammar

MAX_REPETITIONS = 2000  # llama.cpp takes a larger maximum for none at all
MAX_DEPTH = 100  # of parentheses: llama.cpp's parser calls itself
MAX_ELEMENTS = 200_000  # what llama.cpp unfolds repetitions to, 8 bytes each

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_CHARACTER = re.compile(
    r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\([trn\\\"\[\]-])|([^\\])", re.S
)
_REPETITION = re.compile(r"([0-9]{1,9})[ \t]*(?:(,)[ \t]*([0-9]{1,9})?[ \t]*)?\}")
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n"}


def check_gbnf(text: str, max_bytes: int = 64_000) -> None:
    """Refuse a grammar that llama.cpp would refuse, hang on, or end the process for.

    What is accepted is what llama.cpp's parser takes, except: tokens by name or number (`<...>`),
    a rule defined twice, two repetitions in a row, a repetition of what may be empty, and sizes
    beyond the limits above, and recursions that can be read in ever more ways at once (see
    `find_growing`, which tries texts and proves nothing). Not covered: a grammar may still ask for
    characters that a vocabulary lacks.

    Raises:
        InvalidGrammar: says what is wrong and on which line.
    """
    try:
        n_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InvalidGrammar("the grammar holds half of a surrogate pair") from error
    if n_bytes > max_bytes:
        raise InvalidGrammar(f"the grammar has {n_bytes} bytes, {max_bytes} are allowed")
    if "\0" in text:
        raise InvalidGrammar("the grammar holds a NUL character")
    _check_rules(text)


@functools.lru_cache(maxsize=32)  # clients send the same schema with every request
def _check_rules(text: str) -> None:
    problem = find_problem(_Parser(text).parse())
    if problem:
        raise InvalidGrammar(f"the grammar cannot be used: {problem}")


@dataclass
class _Sequence:
    """A sequence as it is read: the last item is what a repetition repeats."""

    elements: Alternative = field(default_factory=list)
    repeatable: bool = False
    size: int = 1  # of the last item, in llama.cpp's elements
    n_symbols: int = 1  # that the last item brought along: llama.cpp limits their product


class _Parser:
    """llama.cpp's recursive descent (src/llama-grammar.cpp), rule for rule, with limits."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.rules = Rules()
        self.n_elements = 0

    def parse(self) -> Rules:
        self._skip(lines=True)
        while self.at < len(self.text):
            self._rule()
        return self.rules

    def _rule(self) -> None:
        name = self._name()
        self._skip()
        if not self.text.startswith("::=", self.at):
            self._fail(f"expected ::= after {name}")
        if name in self.rules.defined:
            self._fail(f"the rule {name} is defined twice")
        self.rules.defined[name] = self.rules.symbol(name)
        self.at += 3
        self._skip(lines=True)
        self._alternatives(self.rules.symbol(name), depth=0)
        if self.at < len(self.text) and self.text[self.at] not in "\r\n":
            self._fail(f"expected the end of the line, not {self.text[self.at]!r}")
        self._skip(lines=True)

    def _alternatives(self, symbol: int, depth: int) -> None:
        if depth > MAX_DEPTH:
            self._fail(f"more than {MAX_DEPTH} parentheses inside each other")
        alternatives = [self._sequence(depth)]
        while self._next() == "|":
            self.at += 1
            self._skip(lines=True)
            alternatives.append(self._sequence(depth))
        self.rules.define(symbol, alternatives)

    def _sequence(self, depth: int) -> Alternative:
        sequence = _Sequence()
        while True:
            character = self._next()
            if character == '"':
                self._literal(sequence)
            elif character == "[":
                self._class(sequence)
            elif character == "(":
                self._group(sequence, depth)
            elif character == ".":
                self.at += 1
                self._terminal(sequence, (((0, 0x10FFFF),),), 1)
            elif character in "*+?{" and character:
                self._repeat(sequence)
            elif character in "<!" and character:
                self._fail("tokens cannot be named in a grammar here")
            elif _NAME.match(character):
                sequence.elements.append(self.rules.symbol(self._name()))
                self._ended(sequence, 1, 1)
            else:
                return sequence.elements
            self._skip(lines=depth > 0)

    def _group(self, sequence: _Sequence, depth: int) -> None:
        self.at += 1
        self._skip(lines=True)
        before = self.rules.n_symbols
        symbol = self.rules.new_symbol()
        self._alternatives(symbol, depth + 1)
        if self._next() != ")":
            self._fail("expected )")
        self.at += 1
        sequence.elements.append(symbol)
        self._ended(sequence, 1, self.rules.n_symbols - before)

    def _literal(self, sequence: _Sequence) -> None:
        self.at += 1
        codes: list[int] = []
        while self._next() != '"':
            codes.append(self._character("a text"))
            if not _is_possible(codes[-1], codes[-1]):
                self._fail(f"no text has the character U+{codes[-1]:04X}")
        self.at += 1
        # Without characters there is nothing to repeat: llama.cpp says so too.
        if codes:
            self._terminal(sequence, tuple(((code, code),) for code in codes), len(codes))
        else:
            sequence.repeatable = False

    def _class(self, sequence: _Sequence) -> None:
        self.at += 1
        negated = self._next() == "^"
        self.at += negated
        ranges: list[tuple[int, int]] = []
        while self._next() != "]":
            first = last = self._character("[")
            if self._next() == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                last = self._character("[")
            if last < first:
                self._fail("a range that ends before it begins")
            ranges.append((first, last))
        self.at += 1
        matched = _complement(ranges) if negated else tuple(ranges)
        if not ranges or not any(_is_possible(*ends) for ends in matched):
            self._fail("a [...] that no character matches")
        self._terminal(sequence, (matched,), 2 * len(ranges))

    def _character(self, inside: str) -> int:
        match = _CHARACTER.match(self.text, self.at)
        if match is None:
            self._fail(f"{inside} without an end, or an unknown escape")
        self.at = match.end()
        *numbers, escape, plain = match.groups()
        digits = next((number for number in numbers if number), None)
        if digits:
            code = int(digits, 16)
            if code > 0x10FFFF:
                self._fail("a character past U+10FFFF")
            return code
        return ord(plain or _ESCAPES.get(escape, escape))

    def _terminal(self, sequence: _Sequence, text: Text, size: int) -> None:
        sequence.elements.append(text)
        self._ended(sequence, size, 1)

    def _ended(self, sequence: _Sequence, size: int, n_symbols: int) -> None:
        sequence.repeatable, sequence.size, sequence.n_symbols = True, size, max(1, n_symbols)
        self._count(size)

    def _repeat(self, sequence: _Sequence) -> None:
        if not sequence.repeatable:
            self._fail("nothing to repeat (or a repetition of a repetition: use parentheses)")
        minimum, maximum = self._times()
        if max(minimum, maximum or 0) > MAX_REPETITIONS:
            self._fail(f"more than {MAX_REPETITIONS} repetitions")
        if maximum is not None and maximum < minimum:
            self._fail("a repetition whose maximum is below its minimum")
        if sequence.n_symbols * (maximum or minimum or 1) > MAX_REPETITIONS:
            self._fail("repetitions of repetitions that multiply to too many")
        n_optional = 1 if maximum is None else maximum - minimum
        self._count(sequence.size * minimum + n_optional * (sequence.size + 3))
        item = sequence.elements.pop()
        sequence.elements.append(self.rules.repeated(item, minimum, maximum, n_optional))
        sequence.repeatable = False

    def _times(self) -> tuple[int, int | None]:
        character = self._next()
        self.at += 1
        if character != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        self._skip()
        match = _REPETITION.match(self.text, self.at)
        if match is None:
            self._fail("expected a repetition like {2}, {2,} or {2,5}")
        self.at = match.end()
        minimum = int(match[1])
        if not match[2]:
            return minimum, minimum
        return minimum, int(match[3]) if match[3] else None

    def _count(self, n: int) -> None:
        self.n_elements += n
        if self.n_elements > MAX_ELEMENTS:
            self._fail(f"its repetitions unfold to more than {MAX_ELEMENTS} elements")

    def _name(self) -> str:
        match = _NAME.match(self.text, self.at)
        if match is None:
            self._fail("expected a rule's name (letters, digits and -)")
        self.at = match.end()
        return match[0]

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _skip(self, *, lines: bool = False) -> None:
        match = (_SPACE_AND_LINES if lines else _SPACE).match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _fail(self, what: str) -> NoReturn:
        line = self.text.count("\n", 0, self.at) + 1
        rest = self.text[self.at : self.at + 20]
        raise InvalidGrammar(f"the grammar is not valid: line {line}, before {rest!r}: {what}")


def _is_possible(first: int, last: int) -> bool:
    """Whether UTF-8 text has a character in the range: not NUL, no surrogate."""
    return max(first, 1) <= min(last, 0xD7FF) or max(first, 0xE000) <= last


def _complement(ranges: list[tuple[int, int]]) -> Ranges:
    kept, free = [], 0
    for first, last in [*sorted(ranges), (0x110000, 0x110000)]:
        if free < first:
            kept.append((free, first - 1))
        free = max(free, last + 1)
    return tuple(kept)
