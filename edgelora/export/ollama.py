"""Ollama's Modelfile for a base and one adapter, with the template that the adapter wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgelora.errors import UnsupportedFile
from edgelora.export.chat_form import ChatForm, to_go

_UNQUOTABLE = "a Modelfile cannot hold this text"


def make_modelfile(
    base: Path,
    adapter: Path,
    form: ChatForm,
    *,
    stops: Sequence[str] = (),
    comments: Sequence[str] = (),
) -> str:
    """The text of a Modelfile (Ollama, docs/modelfile.md and parser/parser.go).

    Without TEMPLATE Ollama guesses one by its likeness to those that it knows, and where none is
    like it, sends prompts without any.

    Args:
        base, adapter: GGUF files; the Modelfile names them by absolute paths.
        stops: texts that end an answer beside the vocabulary's own end tokens.
        comments: lines for people.

    Raises:
        UnsupportedFile: a path or a text that a Modelfile cannot hold.
    """
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    lines += [f"FROM {quoted(str(base.absolute()))}", f"ADAPTER {quoted(str(adapter.absolute()))}"]
    lines.append(f"TEMPLATE {quoted(to_go(form))}")
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def quoted(value: str) -> str:
    """A value as Ollama's parser reads it back; it knows no escapes, and drops other characters.

    Raises:
        UnsupportedFile: control characters, three quotation marks on end, or one at an end.
    """
    problems = [f"the character {c!r}" for c in sorted(set(value)) if not _is_kept(c)]
    if '"""' in value or value.startswith('"') or value.endswith('"'):
        problems.append("quotation marks in a row, or at an end")
    if problems:
        raise UnsupportedFile(f"{value[:200]!r}: {_UNQUOTABLE}", problems=problems)
    if "\n" in value or '"' in value:
        return f'"""{value}"""'
    return f'"{value}"' if value != value.strip() or not value else value


def _is_kept(character: str) -> bool:
    return character.isprintable() or character in "\n\t"
