"""Embeddings of texts, kept by content hash in one SQLite file with a cap."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DEFAULT_CAP_BYTES = 256 * 1024 * 1024
_SCHEMA = """
CREATE TABLE IF NOT EXISTS embedding (
    key BLOB PRIMARY KEY, model TEXT NOT NULL, vector BLOB NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID
"""


def cache_folder() -> Path:
    """EDGELORA_CACHE, or `edgelora` in the platform's cache folder of the user."""
    if given := os.environ.get("EDGELORA_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "edgelora"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgelora"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgelora"


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds for one model."""

    model: str
    n_embeddings: int
    size_bytes: int


class EmbeddingCache:
    """Vectors by (model, token ids). It holds no text, but a vector can tell much about one.

    The oldest are dropped when the vectors exceed `cap_bytes`. A damaged file is started anew:
    the cache is never the only copy of anything.
    """

    def __init__(self, connection: sqlite3.Connection, cap_bytes: int) -> None:
        self._connection = connection
        self._cap_bytes = cap_bytes

    def get(self, model: str, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32] | None]:
        """The stored vector of each text, or None."""
        found: list[NDArray[np.float32] | None] = []
        for text in texts:
            key = _key(model, text)
            row = self._connection.execute(
                "SELECT vector FROM embedding WHERE key = ?", (key,)
            ).fetchone()
            found.append(np.frombuffer(row[0], np.float32) if row else None)
        return found

    def put(
        self, model: str, texts: Sequence[Sequence[int]], vectors: NDArray[np.float32]
    ) -> None:
        """Store one vector for each text, then drop the oldest above the cap."""
        with self._connection as transaction:
            (clock,) = transaction.execute("SELECT ifnull(max(used), 0) FROM embedding").fetchone()
            transaction.executemany(
                "INSERT OR REPLACE INTO embedding VALUES (?, ?, ?, ?)",
                (
                    (_key(model, text), model, vector.astype(np.float32).tobytes(), clock + 1 + i)
                    for i, (text, vector) in enumerate(zip(texts, vectors, strict=True))
                ),
            )
            self._drop_oldest(transaction)

    def entries(self) -> list[CacheEntry]:
        """One line for each model."""
        rows = self._connection.execute(
            "SELECT model, count(*), sum(length(vector)) FROM embedding GROUP BY model ORDER BY 1"
        )
        return [CacheEntry(*row) for row in rows]

    def clear(self) -> int:
        """Drop everything and give the space back; returns how many vectors there were."""
        with self._connection as transaction:
            n = transaction.execute("DELETE FROM embedding").rowcount
        self._connection.execute("VACUUM")
        return n

    def _drop_oldest(self, transaction: sqlite3.Connection) -> None:
        (size,) = transaction.execute(
            "SELECT ifnull(sum(length(vector)), 0) FROM embedding"
        ).fetchone()
        for key, n_bytes in transaction.execute(
            "SELECT key, length(vector) FROM embedding ORDER BY used"
        ).fetchall():
            if size <= self._cap_bytes:
                return
            transaction.execute("DELETE FROM embedding WHERE key = ?", (key,))
            size -= n_bytes


@contextlib.contextmanager
def open_cache(
    folder: Path | None = None, cap_bytes: int = DEFAULT_CAP_BYTES
) -> Iterator[EmbeddingCache]:
    """Open (and create) the cache; a file that SQLite calls damaged is replaced."""
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "embeddings.sqlite"
    connection = _connect(path)
    try:
        yield EmbeddingCache(connection, cap_bytes)
    finally:
        connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    for _ in range(2):
        connection = sqlite3.connect(path, timeout=30)
        try:
            connection.execute(_SCHEMA)
            return connection
        except sqlite3.DatabaseError:
            connection.close()
            path.unlink(missing_ok=True)
    raise sqlite3.DatabaseError(f"{path}: cannot be made")


def _key(model: str, text: Sequence[int]) -> bytes:
    ids = np.asarray(text, np.int32).tobytes()
    return hashlib.sha256(model.encode() + b"\0" + ids).digest()
