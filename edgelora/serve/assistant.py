"""An assistant's turn as it is written: its text, and the calls of tools that begin within it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgelora.serve.tools import Answer, ToolPlan

# Arguments beyond this many characters are sent when they are whole: finding them means reading
# the turn from its beginning for each token.
_STREAMED = 8192


@dataclass(frozen=True)
class Said:
    """More of the turn's content."""

    text: str


@dataclass(frozen=True)
class Called:
    """More of a call's arguments; `id` and `name` are those of a call that begins, else ""."""

    index: int
    arguments: str
    id: str = ""
    name: str = ""


class AssistantTurn:
    """Sorts what a model writes into content and calls, as it comes."""

    def __init__(self, plan: ToolPlan) -> None:
        self._plan = plan
        self._text = ""
        self._content = ""
        self._arguments: list[str] = []

    def add(self, text: str) -> Iterator[Said | Called]:
        """What is certain now that the model has written `text` too."""
        if not self._plan.grammar:
            yield Said(text)
            return
        self._text += text
        yield from self._said(self._plan.content_so_far(self._text))
        if len(self._text) < _STREAMED and self._plan.is_call_so_far(self._text):
            yield from self._called(self._plan.parse(self._text))

    def end(self) -> Iterator[Said | Called]:
        """What was held back until the turn was whole."""
        if self._plan.grammar:
            answer = self._plan.parse(self._text)
            yield from self._said(answer.content or "")
            yield from self._called(answer)

    @property
    def n_calls(self) -> int:
        """Calls that have begun."""
        return len(self._arguments)

    def _said(self, content: str) -> Iterator[Said]:
        if len(content) > len(self._content):
            yield Said(content[len(self._content) :])
            self._content = content

    def _called(self, answer: Answer) -> Iterator[Called]:
        for index, call in enumerate(answer.tool_calls):
            if index == len(self._arguments):
                self._arguments.append("")
                yield Called(index, "", call.id, call.name)
            sent = self._arguments[index]
            if len(call.arguments) > len(sent):
                yield Called(index, call.arguments[len(sent) :])
                self._arguments[index] = call.arguments


def finish_reason(reason: str, n_calls: int) -> str:
    """OpenAI's reason: a turn that called something and was not cut waits for the results."""
    return "tool_calls" if n_calls and reason == "stop" else reason
