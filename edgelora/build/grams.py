"""The kernels between a bank's datasets, for mixture matching, kept by the hash of their samples.

They are k^2 means of 64 x 64 kernel values each, which a dataset alone takes k of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.build.kept import Shelf
from edgelora.operators.mixture import MixtureBank
from edgelora.signature import Signature

KERNELS = Shelf("kernels", ".kernels", 128 << 20)
_VERSION = b"2"
_DIGEST_BYTES = 32
Array = NDArray[np.float64]


def open_mixture(others: Sequence[Signature], *, shelf: Shelf = KERNELS) -> MixtureBank:
    """The bank's part of mixture matching, from the cache if it is there.

    Raises:
        ValueError: there is no signature.
        EdgeLoRAError: the cache cannot be used.
    """
    key = _key(others)
    data = shelf.read(key)
    grams = None if data is None else _unpack(data, len(others))
    bank = MixtureBank(others, grams=grams)
    if grams is None:
        packed = _pack(bank.grams)
        shelf.keep(key, len(packed), lambda path: path.write_bytes(packed))
    return bank


def _key(others: Sequence[Signature]) -> str:
    """Of all that the kernels depend on, in the bank's order."""
    digest = hashlib.sha256(_VERSION + np.__version__.encode())
    for other in others:
        for name, field in other.fields().items():
            digest.update(f"{name} {field.sample.shape} {field.sample_scale!r};".encode())
            digest.update(field.sample.tobytes())
            digest.update(field.mean.tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def _pack(grams: Mapping[str, Array]) -> bytes:
    from safetensors.numpy import save

    body: bytes = save({name: np.ascontiguousarray(gram) for name, gram in grams.items()})
    return hashlib.sha256(body).digest() + body


def _unpack(data: bytes, k: int) -> dict[str, Array] | None:
    """None where the bytes are not those that were kept."""
    from safetensors.numpy import load

    digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    grams: dict[str, Array] = load(body)
    return grams if all(gram.shape == (k, k) for gram in grams.values()) else None
