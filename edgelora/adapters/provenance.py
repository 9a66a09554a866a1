"""How an adapter was made, as the file itself tells it: sources, coefficients, operator, error."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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


def describe_coefficients(
    values: Sequence[float], names: Sequence[str], adapted: Collection[str]
) -> dict[str, object]:
    """What an account of a combination says of one source's coefficients.

    Args:
        values: one for each of the combination's tensors, `names`.
        adapted: the tensors that the source itself updates.

    Returns:
        `coefficient`, the number if it is the same for each tensor, else the mean over those
        that the source updates; then also `coefficients`, all of them in the order of the
        account's `tensors` as base64 of little-endian float16. llama.cpp turns arrays of the
        metadata into long texts, so this one is a short text already.
    """
    own = [value for value, name in zip(values, names, strict=True) if name in adapted]
    if len(set(own)) <= 1:
        return {"coefficient": own[0] if own else 0.0}
    largest = float(np.finfo(np.float16).max)
    packed = np.clip(values, -largest, largest).astype("<f2").tobytes()
    mean = float(f"{math.fsum(own) / len(own):.6g}")
    return {"coefficient": mean, "coefficients": base64.b64encode(packed).decode("ascii")}


def read_coefficients(provenance: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Coefficients by tensor of each source that has other ones for other tensors.

    {} if there are none, or none that can be read.
    """
    tensors, sources = provenance.get("tensors"), provenance.get("sources")
    if not isinstance(tensors, dict) or not isinstance(sources, list):
        return {}
    found = {}
    for source in sources:
        text = source.get("coefficients") if isinstance(source, dict) else None
        values = _unpacked(text, len(tensors)) if isinstance(text, str) else None
        if values is not None:
            found[str(source.get("name"))] = dict(zip(tensors, values, strict=True))
    return found


def _unpacked(text: str, n: int) -> list[float] | None:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    values = np.frombuffer(data, "<f2") if len(data) == 2 * n else np.full(1, np.nan)
    return [float(value) for value in values] if np.isfinite(values).all() else None
