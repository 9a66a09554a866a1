"""How an adapter was made, as the file itself tells it: sources, coefficients, operator, error."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from edgelora.errors import InvalidFile

if TYPE_CHECKING:
    from edgelora.adapters.gguf_lora import LoraFile

PROVENANCE_KEY = "edgelora.provenance"


def read_provenance(lora: LoraFile) -> dict[str, Any]:
    """The file's own account, {} if it has none.

    Raises:
        InvalidFile: an account that is not shallow JSON with finite numbers, as ours are.
    """
    text = lora.metadata.get(PROVENANCE_KEY)
    if text is None:
        return {}
    try:
        found = json.loads(str(text))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not is_plain(found):
        raise InvalidFile(f"{lora.path}: its provenance cannot be read")
    return found


def is_plain(value: object, n_levels: int = 8) -> bool:
    """Whether a JSON value is shallow and its numbers are finite."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return n_levels > 0 and all(is_plain(item, n_levels - 1) for item in inner)
    return not isinstance(value, float) or math.isfinite(value)
