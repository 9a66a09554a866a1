"""One error tree: every message says what is wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class EdgeLoRAError(Exception):
    """Something the user can act on; the command line prints it without a traceback.

    Args:
        what: one sentence that names the file, line or tensor at fault.
        problems: every problem found, one line each (printed as a list).
        hint: what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        self.what = what
        self.problems = tuple(problems)
        self.hint = hint
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.what, *(f"  - {problem}" for problem in self.problems)]
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)


class InvalidFile(EdgeLoRAError):
    """A file is damaged, truncated, hostile or not what it claims to be."""


class UnsupportedFile(EdgeLoRAError):
    """A sound file that uses something EdgeLoRA refuses by name rather than guess."""


class IncompatibleAdapter(EdgeLoRAError):
    """An adapter that does not fit this base: names, shapes or identity differ."""


class DatasetError(EdgeLoRAError):
    """A dataset that cannot be read as examples."""


class TemplateError(EdgeLoRAError):
    """A prompt template that is missing, invalid or cannot render these messages."""


class BankError(EdgeLoRAError):
    """A bank folder that is missing, damaged or in use."""


class EngineError(EdgeLoRAError):
    """llama.cpp refused a model, an adapter or a batch."""


class ContextFull(EngineError):
    """The KV cache has no cells left for a batch; nothing of the batch was computed."""


class Aborted(EngineError):
    """A batch was stopped on request; the sequences in it are to be dropped."""


class InvalidGrammar(EngineError):
    """A GBNF grammar that llama.cpp does not parse, or that allows no token of the vocabulary."""


class SchemaError(EdgeLoRAError):
    """A JSON schema, or a tool, that a grammar cannot enforce; `problems` names every place."""


class NotFound(EdgeLoRAError):
    """A named base, adapter or file that does not exist."""


class HubError(EdgeLoRAError):
    """The Hub refuses, sends something else than it promised, or is not to be asked (offline)."""


class HubUnreachable(HubError):
    """The Hub does not answer: trying the next file would fail in the same way."""


class ClusterError(EdgeLoRAError):
    """A scheduler and its workers that cannot do the work: absent, gone, or set up otherwise."""


class AlreadyExists(EdgeLoRAError):
    """An output that would be overwritten without --force."""


class NoImprovement(EdgeLoRAError):
    """No candidate beat the base on the user's own examples; nothing was published."""

    exit_code = 3
