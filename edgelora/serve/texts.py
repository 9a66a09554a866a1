"""Bytes of tokens to text that is final: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from edgelora.serve.jobs import TokenLogprob


class AnswerText:
    """One answer's text as it is made.

    Text is given out when no suffix of it can begin a stop string; a character whose bytes come in
    several tokens is given out whole.

    Attributes:
        stop: the stop string that was found; nothing follows it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stop: str | None = None
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._n_given = 0
        self._waiting: list[tuple[int, TokenLogprob]] = []

    def feed(self, data: bytes, logprob: TokenLogprob | None = None, *, last: bool = False) -> str:
        """Add one token's bytes; returns what is final now, perhaps "" (all of it at the last)."""
        if logprob is not None:
            self._waiting.append((self._n_given + len(self._held), logprob))
        self._held += self._decoder.decode(data, last)
        if not self._stops:
            return self._give(len(self._held))
        found = self._find()
        if found is None:
            return self._give(len(self._held) - (0 if last else self._n_possible()))
        at, self.stop = found
        text = self._give(at)
        self._held = ""
        return text

    def tokens(self, *, every: bool = False) -> tuple[TokenLogprob, ...]:
        """The tokens whose text has begun to be given out (or every one), each once."""
        n = len(self._waiting)
        if not every:
            n = sum(start < self._n_given for start, _ in self._waiting)
        given, self._waiting = self._waiting[:n], self._waiting[n:]
        return tuple(logprob for _, logprob in given)

    def _find(self) -> tuple[int, str] | None:
        """Where the stop string begins that is complete first, whatever the tokens' borders."""
        found = [
            (at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0
        ]
        if not found:
            return None
        _, at, stop = min(found)
        return at, stop

    def _n_possible(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for n in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0

    def _give(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        self._n_given += n
        return text
