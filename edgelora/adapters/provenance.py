"""How an adapter was made, as the file itself tells it: sources, coefficients, operator, error."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelora.adapters.lora import for_components
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
    values: ArrayLike, names: Sequence[str], ranks: Mapping[str, int]
) -> dict[str, object]:
    """What an account of a combination says of one source's coefficients.

    Args:
        values: one for each of the combination's n tensors, `names`, (n,); or one for each
            rank-one component of the source in each, (n, r), padded.
        ranks: of the source, for each tensor that it updates.

    Returns:
        `coefficient`, the number if it is the same everywhere (kept for a source whose updates all
        cancelled out), else the mean over what the source updates; then also `coefficients`, all
        of them in the order of the account's `tensors` as base64 of little-endian float16.
        llama.cpp turns arrays of the metadata into long texts, so this one is a short text already.
    """
    table = np.asarray(values, np.float64)
    own = own_coefficients(table, names, ranks) or table.ravel().tolist()
    if len(set(own)) <= 1:
        return {"coefficient": own[0] if own else 0.0}
    if table.ndim == 2:
        table = table[:, : max(ranks.values())]
    largest = float(np.finfo(np.float16).max)
    packed = np.clip(table, -largest, largest).astype("<f2").tobytes()
    mean = float(f"{mean_coefficient(table, names, ranks):.6g}")
    return {"coefficient": mean, "coefficients": base64.b64encode(packed).decode("ascii")}


def own_coefficients(
    table: NDArray[np.float64], names: Sequence[str], ranks: Mapping[str, int]
) -> list[float]:
    """Those of the tensors that the source updates, and without padding."""
    own = [(row, ranks[name]) for row, name in zip(table, names, strict=True) if name in ranks]
    if table.ndim == 1:
        return [float(row) for row, _ in own]
    return [float(value) for row, rank in own for value in for_components(row, rank)]


def mean_coefficient(
    table: NDArray[np.float64], names: Sequence[str], ranks: Mapping[str, int]
) -> float:
    """One number for a source whose coefficients differ, 0 where it updates nothing."""
    own = own_coefficients(table, names, ranks)
    return math.fsum(own) / len(own) if own else 0.0


def read_coefficients(
    provenance: Mapping[str, Any],
) -> dict[str, dict[str, float | list[float]]]:
    """Coefficients by tensor of each source that has other ones for other tensors or components.

    A list has one for each component. {} if there are none, or none that can be read.
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


def _unpacked(text: str, n: int) -> list[float | list[float]] | None:
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f2")
        table = values.astype(np.float64).reshape(n, -1)
    except (binascii.Error, ValueError, ZeroDivisionError):
        return None
    if not table.size or not np.isfinite(table).all():
        return None
    rows: list[float | list[float]] = (table[:, 0] if table.shape[1] == 1 else table).tolist()
    return rows
