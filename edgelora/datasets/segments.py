"""Rendered text as segments: control tokens that the template wrote, and everything else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from edgelora.errors import TemplateError

_PRIVATE_USE = (range(0xE000, 0xF8FF), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered prompt: one control token, or all plain text up to the next one."""

    text: str
    control: bool


@dataclass(frozen=True)
class Marks:
    """Private-use characters that no text at hand holds: one to break, the rest stand in."""

    sentinel: str
    stand_ins: str


class Guard:
    """Keeps control strings that were typed apart from those that a template writes."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        longest_first = sorted(control_tokens, key=lambda token: (-len(token), token))
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"
        firsts = "|".join(sorted({re.escape(token[0]) for token in longest_first})) or "(?!)"
        ends = {token[0] for token in longest_first} | {token[-1] for token in longest_first}
        self._whole = re.compile(f"({alternatives})")
        self._starts = re.compile(f"(?=(?:{alternatives}))(.)", re.DOTALL)
        self._firsts = re.compile(f"({firsts})", re.DOTALL)
        self._ends = frozenset(ends)
        # A token of one character cannot be broken inside: another character stands in for it.
        self._singles = "".join(token for token in longest_first if len(token) == 1)
        self._used = frozenset(chain.from_iterable(longest_first))

    def is_safe(self, contents: Iterable[str]) -> bool:
        """Whether nothing typed could begin or end a control string."""
        return self._ends.isdisjoint(chain.from_iterable(contents))

    def marks(self, texts: Iterable[str]) -> Marks:
        """Characters for `broken` and `split` that none of `texts` contains.

        Raises:
            TemplateError: the texts use up all 137,000 private-use characters.
        """
        used = self._used.union(*texts)
        free = (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in used)
        chosen = "".join(islice(free, 1 + len(self._singles)))
        if len(chosen) <= len(self._singles):
            raise TemplateError("the messages hold every private-use character of Unicode")
        return Marks(chosen[0], chosen[1:])

    def broken(self, content: str, marks: Marks, *, thorough: bool = False) -> str:
        """`content` with each control string (if thorough, each possible start) interrupted."""
        content = content.translate(str.maketrans(self._singles, marks.stand_ins))
        pattern = self._firsts if thorough else self._starts
        return pattern.sub(lambda match: match[1] + marks.sentinel, content)

    def split(self, text: str, marks: Marks) -> list[Segment]:
        """Cut at control strings, then take the marks out of the texts between them."""
        pieces = self._whole.split(text)
        back = str.maketrans(marks.stand_ins, self._singles, marks.sentinel)
        texts = (piece if i % 2 else piece.translate(back) for i, piece in enumerate(pieces))
        return [Segment(piece, i % 2 == 1) for i, piece in enumerate(texts) if piece]


def controls(segments: Iterable[Segment]) -> list[str]:
    """The control tokens in order."""
    return [segment.text for segment in segments if segment.control]


def after(prompt: Sequence[Segment], whole: Sequence[Segment]) -> list[Segment] | None:
    """What `whole` has after `prompt`, or None if it does not begin with it."""
    n = len(prompt)
    if list(whole[:n]) == list(prompt):
        return list(whole[n:])
    if prompt[-1].control or len(whole) < n or whole[n - 1].control:
        return None
    begun, text = prompt[-1].text, whole[n - 1].text
    if list(whole[: n - 1]) != list(prompt[:-1]) or not text.startswith(begun):
        return None
    return [Segment(text[len(begun) :], False), *whole[n:]]


@dataclass(frozen=True)
class Ending:
    """How a template ends an answer: control tokens before its content, what comes behind."""

    n_controls: int
    suffix: str
    end: str | None


def find_ending(tail: Sequence[Segment], probe: str) -> Ending | None:
    """The ending of an answer that is `probe`; None if the probe is not there."""
    at = max((i for i, segment in enumerate(tail) if probe in segment.text), default=None)
    if at is None:
        return None
    end = next((segment.text for segment in tail[at:] if segment.control), None)
    suffix = "" if end is not None else tail[at].text.rpartition(probe)[2]
    return Ending(len(controls(tail[:at])), suffix, end)


def cut(tail: Sequence[Segment], ending: Ending) -> list[Segment]:
    """`tail` up to its end token, or up to the text that the template writes instead of one."""
    kept: list[Segment] = []
    n_controls = 0
    for segment in tail:
        n_controls += segment.control
        if segment.control and n_controls > ending.n_controls:
            return kept
        kept.append(segment)
    if kept and ending.suffix:
        text = kept[-1].text.removesuffix(ending.suffix)
        kept[-1:] = [Segment(text, False)] if text else []
    return kept
