"""Regular expressions that a file brings: refused where to match a name could take forever.

Python's matcher tries every way to share a name among the parts of a pattern, and nothing can stop
it. So a repeat inside a repeat is refused, and so are many repeats or choices one after the other.
"""

from __future__ import annotations

import functools
import re
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 50_000
# Unsloth writes four of `.*?` in a row, with choices of 2, 7 and 7 between them.
MAX_REPEATS = 4
MAX_CHOICES = 10_000
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def why_refused(pattern: str, template: str = "{}") -> str:
    """Why a pattern is not matched; '' for one that is.

    Args:
        template: what the pattern is put into before it is matched.
    """
    if len(pattern) > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH} characters"
    try:
        compiled(template.format(pattern))
        parsed = _parser.parse(pattern)
        n_repeats, n_choices = _count(parsed)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no regular expression ({str(error)[:100]})"
    if n_repeats > MAX_REPEATS or n_choices > MAX_CHOICES:
        return "to match it could take forever"
    return ""


@functools.lru_cache(maxsize=1 << 14)
def compiled(pattern: str) -> re.Pattern[str]:
    """`re.compile`, whose own cache is too small for a pattern for each module of a model."""
    return re.compile(pattern)


def _count(parsed: Any) -> tuple[int, int]:
    """Repeats of any length in a row, and the product of all choices; (infinite, _) if nested."""
    n_repeats, n_choices = 0, 1
    for operation, argument in parsed:
        repeats, choices = _count_one(operation.name, argument)
        n_repeats, n_choices = n_repeats + repeats, n_choices * choices
        if n_repeats > MAX_REPEATS or n_choices > MAX_CHOICES:
            break
    return n_repeats, n_choices


def _count_one(operation: str, argument: Any) -> tuple[int, int]:
    if operation in _REPEATS:
        least, most, inside = argument
        repeats, choices = _count(inside)
        if int(most) <= 1:  # what may be there, once
            return repeats, 1 + choices
        varies = int(most) > int(least)
        return (MAX_REPEATS + 1 if repeats or choices > 1 else int(varies)), 1
    if operation == "BRANCH":
        counts = [_count(branch) for branch in argument[1]]
        return max(r for r, _ in counts), sum(c for _, c in counts)
    if operation == "GROUPREF_EXISTS":
        counts = [_count(branch) for branch in argument[1:] if branch is not None]
        return max(r for r, _ in counts), sum(c for _, c in counts)
    inner = argument if isinstance(argument, tuple | list) else ()
    parts = [_count(part) for part in inner if isinstance(part, _parser.SubPattern)]
    if isinstance(argument, _parser.SubPattern):  # an atomic group
        parts.append(_count(argument))
    return sum(r for r, _ in parts), functools.reduce(lambda a, b: a * b[1], parts, 1)
