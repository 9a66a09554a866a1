"""Names of adapters: safe as file names on every system, and never two that differ in case only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from edgelora.errors import BankError

MAX_LENGTH = 100
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))]
)
# Folders that say nothing about the adapter inside; their parent's name is taken.
_GENERIC = frozenset(["adapter", "adapters"])


def derive_name(folder: Path) -> str:
    """The name that an adapter folder suggests: its own, or its parent's if it is just `adapter`.

    Example:
        >>> derive_name(Path("/bank/task190 (snli)/adapter"))
        'task190-snli'
    """
    folder = folder.resolve()
    word = folder.parent.name if folder.name.lower() in _GENERIC else folder.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", word).strip("-.")[:MAX_LENGTH].rstrip("-.")
    if not name:
        return "adapter"
    return f"{name.split('.')[0]}_{name[len(name.split('.')[0]) :]}" if _reserved(name) else name


def check_name(name: str) -> None:
    """Refuse a name that some system cannot store as a file.

    Raises:
        BankError: characters other than letters, digits, `.`, `_`, `-`; a first `.` or `-`; a last
            `.`; more than 100 characters; or a device name of Windows (CON, NUL, COM1 ...).
    """
    problems = []
    if not _SAFE.fullmatch(name):
        problems.append("only letters, digits, '.', '_' and '-', and neither '.' nor '-' first")
    if name.endswith("."):
        problems.append("no '.' at the end")
    if len(name) > MAX_LENGTH:
        problems.append(f"at most {MAX_LENGTH} characters")
    if _reserved(name):
        problems.append("not a device name of Windows")
    if problems:
        raise BankError(f"{name!r} cannot name an adapter", problems=problems, hint="Use --name.")


def find_clash(name: str, names: Iterable[str]) -> str | None:
    """The existing name that means the same file as `name` where case does not count."""
    return next((other for other in names if other.casefold() == name.casefold()), None)


def _reserved(name: str) -> bool:
    return name.split(".")[0].casefold() in _RESERVED
