"""A signature as a safetensors file and back; a file is hostile until checked."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import InvalidFile
from edgelora.signature.record import Histogram, Signature, TextDistribution, find_problems

# Version 2 says from which layers; programs that read only 1 take all signatures for comparable.
VERSIONS = (1, 2)
MAX_VOCAB = 1 << 22
_METADATA_KEY = "edgelora.signature"
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError, RecursionError, zlib.error)


def to_bytes(signature: Signature) -> bytes:
    """A signature as a safetensors file; the same signature gives the same bytes."""
    from safetensors.numpy import save

    histogram = _pack(signature.histogram)
    tensors: dict[str, NDArray[Any]] = {"histogram": np.frombuffer(histogram, np.uint8)}
    facts: dict[str, Any] = {
        "version": VERSIONS[signature.n_layers > 0],
        "base_id": signature.base_id,
        "description": signature.description,
        "n_vocab": signature.n_vocab,
        "n_tokens": signature.n_tokens,
        "n_distinct": len(signature.histogram.ids),
    }
    if signature.n_layers:
        facts["n_layers"] = signature.n_layers
    for name, field in signature.fields().items():
        with np.errstate(over="ignore"):  # an infinity is not exact, so float32 is written
            halves = field.mean.astype(np.float16)
        exact = bool((halves.astype(np.float32) == field.mean).all())
        tensors[f"{name}.mean"] = halves if exact else field.mean
        tensors[f"{name}.basis"] = field.basis
        tensors[f"{name}.variances"] = field.variances
        tensors[f"{name}.sample"] = field.sample
        facts[name] = [field.n, field.residual_variance, field.sample_scale]
    # safetensors reads memory as it lies, so a transposed array would be written transposed.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    # One key only: safetensors writes its metadata in the random order of a hash map.
    return save(tensors, metadata={_METADATA_KEY: json.dumps(facts, sort_keys=True)})


def from_bytes(data: bytes, where: str = "signature") -> Signature:
    """Read what `to_bytes` wrote, trusting nothing in it.

    Args:
        where: the file's name, for the error.

    Raises:
        InvalidFile: not a signature, of another version, or with values out of bounds.
    """
    try:
        signature = _parse(data)
        problems = find_problems(signature)
    except _MALFORMED as error:
        problems = [f"{type(error).__name__}: {error}"]
    if problems:
        raise InvalidFile(
            f"{where}: not a sound signature",
            problems=problems,
            hint="Delete it and compute it again from the dataset (edgelora bank add --data).",
        )
    return signature


def _pack(histogram: Histogram) -> bytes:
    # Gaps and counts are small: byte planes put the zeros together, and zlib removes them.
    gaps = np.diff(histogram.ids, prepend=0)
    planes = np.concatenate([gaps, histogram.counts]).astype("<u4").view(np.uint8).reshape(-1, 4).T
    return zlib.compress(planes.tobytes(), 9)


def _unpack(packed: bytes, n_distinct: int) -> Histogram:
    size = 8 * n_distinct
    reader = zlib.decompressobj()
    raw = reader.decompress(packed, size + 1)
    if len(raw) != size or not reader.eof:
        raise ValueError("the histogram has another size than its header says")
    planes = np.frombuffer(raw, np.uint8).reshape(4, -1)
    values = np.ascontiguousarray(planes.T).view("<u4").ravel().astype(np.int64)
    ids, counts = np.cumsum(values[:n_distinct]), values[n_distinct:]
    limit = np.iinfo(np.int32).max
    if n_distinct and max(ids.max(), counts.max()) > limit:
        raise ValueError("the histogram holds ids or counts beyond 31 bits")
    return Histogram(ids.astype(np.int32), counts.astype(np.int32))


def _parse(data: bytes) -> Signature:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = json.loads(header["__metadata__"][_METADATA_KEY])
    if facts["version"] not in VERSIONS:
        raise ValueError(f"format version {facts['version']}; this program reads 1 and 2")
    n_distinct, n_vocab = _integer(facts["n_distinct"]), _integer(facts["n_vocab"])
    if not 0 <= n_distinct <= n_vocab <= MAX_VOCAB:
        raise ValueError(f"{n_distinct} distinct tokens of a vocabulary of {n_vocab}")
    if not isinstance(facts["base_id"], str) or not isinstance(facts["description"], str):
        raise TypeError("base_id and description must be strings")
    return Signature(
        prompt=_parse_field("prompt", tensors, facts),
        completion=_parse_field("completion", tensors, facts) if "completion" in facts else None,
        histogram=_unpack(tensors["histogram"].tobytes(), n_distinct),
        n_vocab=n_vocab,
        n_tokens=_integer(facts["n_tokens"]),
        base_id=facts["base_id"],
        description=facts["description"],
        n_layers=_integer(facts["n_layers"]) if facts["version"] == 2 else 0,
    )


def _parse_field(
    name: str, tensors: dict[str, NDArray[Any]], facts: dict[str, Any]
) -> TextDistribution:
    n, residual_variance, sample_scale = facts[name]
    arrays = {key: tensors[f"{name}.{key}"] for key in ("mean", "basis", "variances", "sample")}
    for key, array in arrays.items():
        if array.dtype not in (np.float16, np.float32):
            raise TypeError(f"{name}.{key} has type {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # an infinity is found by find_problems
        return TextDistribution(
            n=_integer(n),
            mean=arrays["mean"].astype(np.float32),
            basis=arrays["basis"].astype(np.float16),
            variances=arrays["variances"].astype(np.float32),
            residual_variance=float(residual_variance),
            sample=arrays["sample"].astype(np.float16),
            sample_scale=float(sample_scale),
        )


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not an integer")
    return value
