"""The command line with which llama.cpp's llama-server runs a base with one adapter."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from edgelora.errors import UnsupportedFile


def server_words(
    base: Path, adapter: Path, *, scale: float = 1.0, chat_template: Path | None = None
) -> list[str]:
    """The words of the command; nothing is run.

    Args:
        scale: what the adapter's update is multiplied by; 1 needs no word of its own.
        chat_template: a jinja file in place of the base's own template.

    Raises:
        UnsupportedFile: a scale, and a path with the colon that llama-server splits at.
    """
    words = ["llama-server", "--model", str(base.absolute())]
    if scale == 1.0:
        words += ["--lora", _csv(str(adapter.absolute()))]
    else:
        words += ["--lora-scaled", _csv(f"{_without_colon(adapter)}:{scale!r}")]
    words.append("--jinja")
    if chat_template is not None:
        words += ["--chat-template-file", str(chat_template.absolute())]
    return words


def command_line(words: list[str], *, windows: bool) -> str:
    """The words as one line for the shell: POSIX's, or that of Windows."""
    return subprocess.list2cmdline(words) if windows else shlex.join(words)


def _csv(value: str) -> str:
    """llama-server reads a list of comma-separated fields (common/arg.cpp, parse_csv_row)."""
    if "," not in value and not value.startswith('"'):
        return value
    return '"' + value.replace('"', '""') + '"'


def _without_colon(adapter: Path) -> str:
    """The path as llama-server can split it from its scale; relative where a drive has a colon."""
    absolute = adapter.absolute()
    here = Path.cwd()
    for path in (absolute, absolute.relative_to(here) if absolute.is_relative_to(here) else None):
        if path is not None and ":" not in str(path):
            return str(path)
    raise UnsupportedFile(
        f"{adapter}: llama-server splits the path from its scale at a colon, and the path has one",
        hint="Write the scale into a file of its own: edgelora merge FILE:SCALE -o OUT. Or run "
        "this in the adapter's folder.",
    )
