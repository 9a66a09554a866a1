"""What a dataset is made of: messages, examples, and the file they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn: `role` is one of ROLES, `content` plain text."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One line of a dataset.

    Attributes:
        messages: the prompt's turns, the last one a user turn.
        completion: the wanted answer, or None in a dataset without answers.
        references: every answer that counts as right (the completion itself if the file names
            no others), empty without a completion.
        line: 1-based line of the file (record or instance number where a format has no lines).
    """

    messages: tuple[Message, ...]
    completion: str | None
    references: tuple[str, ...]
    line: int

    @property
    def prompt(self) -> str:
        """The text of the last user turn."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Dataset:
    """A dataset that was read: its recognised format, its examples, and what was left out."""

    path: Path
    format: str
    examples: tuple[Example, ...]
    warnings: tuple[str, ...]

    @property
    def has_completions(self) -> bool:
        """Whether the examples carry answers (all of them do, or none)."""
        return self.examples[0].completion is not None
