"""The paper's Neural head: an MLP from one z-score to one cost, run with numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import InvalidFile

FILE_NAME = "neural.safetensors"  # in the folder of the bank
FORMAT_VERSION = 1
LAYER_NORM_EPSILON = 1e-5
MAX_POINTS = 1 << 16
TABLE_RANGE = 32.0  # z-scores of k distances stay within sqrt(k): enough for a bank of 1,000
TABLE_POINTS = 8_193
_METADATA_KEY = "edgelora.neural"
_MLP_NAMES = ("w1", "b1", "g1", "c1", "w2", "b2", "g2", "c2", "w3", "b3")
Array = NDArray[np.float64]
Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class NeuralHead:
    """A trained head for one distance.

    Attributes:
        distance: the distance whose z-scores it was trained on.
        diagonal: whether those z-scores counted the diagonal, as in the paper's code.
        table: (t,) float32: its values at t evenly spaced z-scores from -32 to 32. Between them it
            is interpolated; beyond them it is constant, as the MLP nearly is, since its LayerNorm
            divides a large input away.
        note: how it was trained, one line.
    """

    distance: str
    diagonal: bool
    table: NDArray[np.float32]
    note: str = ""

    def __call__(self, z: Array) -> Array:
        """The cost of each z-score: (k,) float64 -> (k,) float64."""
        grid = np.linspace(-TABLE_RANGE, TABLE_RANGE, len(self.table))
        return np.interp(z, grid, self.table.astype(np.float64))


def mlp(z: Array, weights: Arrays) -> Array:
    """Linear 1-h, LayerNorm, ReLU, linear h-h, LayerNorm, ReLU, linear h-1 on each scalar.

    Args:
        z: (n,) z-scores.
        weights: w1 (h, 1), b1 (h,), LayerNorm's gain g1 and bias c1 (h,), w2 (h, h), b2, g2, c2
            (h,), w3 (1, h), b3 (1,): torch's layouts.

    Returns:
        (n,) float64.
    """
    w = {name: weights[name].astype(np.float64) for name in _MLP_NAMES}
    hidden = np.asarray(z, np.float64)[:, None] @ w["w1"].T + w["b1"]
    hidden = np.maximum(_layer_norm(hidden) * w["g1"] + w["c1"], 0.0)
    hidden = hidden @ w["w2"].T + w["b2"]
    hidden = np.maximum(_layer_norm(hidden) * w["g2"] + w["c2"], 0.0)
    result: Array = (hidden @ w["w3"].T + w["b3"])[:, 0]
    return result


def tabulate(weights: Arrays) -> NDArray[np.float32]:
    """The MLP's values on the table's grid, (t,) float32: 32 KB in place of 64 MB of weights."""
    grid = np.linspace(-TABLE_RANGE, TABLE_RANGE, TABLE_POINTS)
    return np.concatenate([mlp(part, weights) for part in np.array_split(grid, 32)]).astype(
        np.float32
    )


def save_heads(heads: Mapping[str, NeuralHead]) -> bytes:
    """The heads of a bank, by distance, as a safetensors file."""
    from safetensors.numpy import save

    facts = {
        name: {"distance": head.distance, "diagonal": head.diagonal, "note": head.note}
        for name, head in heads.items()
    }
    metadata = json.dumps({"version": FORMAT_VERSION, "heads": facts}, sort_keys=True)
    tables = {name: np.ascontiguousarray(head.table) for name, head in sorted(heads.items())}
    return save(tables, metadata={_METADATA_KEY: metadata})


def load_heads(data: bytes, where: str = FILE_NAME) -> dict[str, NeuralHead]:
    """Read what `save_heads` wrote, trusting nothing in it.

    Raises:
        InvalidFile: not such a file, of another version, or with values out of bounds.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tables = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = json.loads(header["__metadata__"][_METADATA_KEY])
        if facts["version"] != FORMAT_VERSION:
            raise ValueError(f"format version {facts['version']}, not {FORMAT_VERSION}")
        return {name: _head(tables[name], fact) for name, fact in facts["heads"].items()}
    except (SafetensorError, *_MALFORMED) as error:
        raise InvalidFile(
            f"{where}: not a sound file of Neural heads ({error})",
            hint="Train them again with scripts/train_neural.py.",
        ) from error


_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


def _head(table: NDArray[Any], fact: Mapping[str, object]) -> NeuralHead:
    if table.ndim != 1 or not 2 <= len(table) <= MAX_POINTS or table.dtype != np.float32:
        raise ValueError(f"a table of shape {table.shape} and type {table.dtype}")
    if not np.isfinite(table).all():
        raise ValueError("NaN or infinity")
    distance, diagonal, note = fact["distance"], fact["diagonal"], fact["note"]
    if not (isinstance(distance, str) and isinstance(diagonal, bool) and isinstance(note, str)):
        raise TypeError("distance and note must be strings, diagonal true or false")
    return NeuralHead(distance, diagonal, table, note)


def _layer_norm(rows: Array) -> Array:
    centred = rows - rows.mean(axis=1, keepdims=True)
    variance = (centred**2).mean(axis=1, keepdims=True)
    result: Array = centred / np.sqrt(variance + LAYER_NORM_EPSILON)
    return result
