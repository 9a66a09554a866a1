"""What travels with the code: files of models/, in an installed wheel and in a checkout."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path:
    """Where `models/<name>` is: in the wheel beside the code, in a checkout beside the package.

    Example:
        >>> shipped("bases.json").parent.name
        'models'
    """
    inside = Path(__file__).parent / "models" / name
    return inside if inside.exists() else Path(__file__).parent.parent / "models" / name
