"""Pictures that are the same bytes on every machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_HASHED = re.compile(r'id="([mp][0-9a-f]{10})"')


def save_svg(figure: Any, path: Path) -> None:
    """Save a matplotlib figure without its date, ids numbered as they appear.

    Matplotlib's are hashes of coordinates, whose last bits differ between CPUs.
    """
    figure.savefig(path, metadata={"Date": None})
    text = path.read_text(encoding="utf-8")
    for number, name in enumerate(dict.fromkeys(_HASHED.findall(text)), start=1):
        text = text.replace(name, f"{name[0]}{number}")
    path.write_text(text, encoding="utf-8")
