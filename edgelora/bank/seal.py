"""The content hash that an adapter file carries in its own metadata, and how it is checked.

`edgelora.content_sha256` is the SHA-256 of the whole file with those 64 characters read as zeros,
so one file holds everything and is published by one rename. It finds damage, not forgery.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from pathlib import Path

from edgelora.errors import InvalidFile

KEY = "edgelora.content_sha256"
PLACEHOLDER = "0" * 64
_STRING = 8  # GGUF's value type
# Key and value as GGUF stores them: u64 length and bytes, u32 type, u64 length; then the value.
_PATTERN = struct.pack("<Q", len(KEY)) + KEY.encode() + struct.pack("<IQ", _STRING, 64)


def seal(path: Path) -> str:
    """Put the file's hash in the place of PLACEHOLDER, which its metadata holds; returns it.

    Raises:
        InvalidFile: the file has no such place.
    """
    place, _ = _find(path)
    digest = _hash_around(path, place)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())
    return digest


def is_intact(path: Path) -> bool:
    """Whether the file still has the bytes that were sealed.

    Raises:
        InvalidFile: the file records no hash.
    """
    place, recorded = _find(path)
    return recorded == _hash_around(path, place).encode()


def _find(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = data.find(_PATTERN)
        if place < 0:
            raise InvalidFile(f"{path}: records no content hash")
        place += len(_PATTERN)
        return place, data[place : place + 64]


def _hash_around(path: Path, place: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(place))
        file.seek(place + len(PLACEHOLDER))
        digest.update(PLACEHOLDER.encode())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
