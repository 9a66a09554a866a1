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

from edgelora.errors import EdgeLoRAError, InvalidFile

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

    Every method raises EdgeLoRAError where the file is locked for too long, the disk is full or
    damage shows only now.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, cap_bytes: int) -> None:
        self._path = path
        self._connection = connection
        self._cap_bytes = cap_bytes

    def get(self, model: str, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32] | None]:
        """The stored vector of each text, or None."""
        found: list[NDArray[np.float32] | None] = []
        with _explained(self._path):
            for text in texts:
                key = _key(model, text)
                row = self._connection.execute(
                    "SELECT vector FROM embedding WHERE key = ?", (key,)
                ).fetchone()
                found.append(_vector(row[0]) if row else None)
        return found

    def put(self, model: str, texts: Sequence[Sequence[int]], vectors: NDArray[np.float32]) -> None:
        """Store one vector for each text, then drop the oldest above the cap."""
        with _explained(self._path), self._connection as transaction:
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
        query = "SELECT model, count(*), sum(length(vector)) FROM embedding GROUP BY 1 ORDER BY 1"
        with _explained(self._path):
            return [CacheEntry(*row) for row in self._connection.execute(query)]

    def clear(self) -> int:
        """Drop everything and give the space back; returns how many vectors there were."""
        with _explained(self._path):
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
    folder: Path | None = None,
    cap_bytes: int = DEFAULT_CAP_BYTES,
    *,
    timeout_s: float = 30.0,
) -> Iterator[EmbeddingCache]:
    """Open (and create) the cache; a file that SQLite calls damaged is replaced.

    Raises:
        EdgeLoRAError: the file cannot be opened or written, or another process has held it for
            longer than `timeout_s`.
    """
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "embeddings.sqlite"
    with _explained(path):
        connection = _connect(path, timeout_s)
    try:
        yield EmbeddingCache(path, connection, cap_bytes)
    finally:
        connection.close()


def _connect(path: Path, timeout_s: float) -> sqlite3.Connection:
    try:
        return _with_table(path, timeout_s)
    except sqlite3.OperationalError:
        raise  # locked, read-only, no space: the file itself may be whole
    except sqlite3.DatabaseError:
        path.unlink(missing_ok=True)
        return _with_table(path, timeout_s)


def _with_table(path: Path, timeout_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=timeout_s)
    try:
        connection.execute(_SCHEMA)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors as ours: what to do differs between a file in trouble and a damaged one."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise EdgeLoRAError(
            f"{path}: the cache of embeddings cannot be used ({error})",
            hint="Let other edgelora commands end, free disk space, or set EDGELORA_CACHE to "
            "another folder. The file may also be deleted: it is never the only copy.",
        ) from error
    except sqlite3.DatabaseError as error:
        raise InvalidFile(
            f"{path}: the cache of embeddings is damaged ({error})",
            hint="Delete the file: it is never the only copy of anything.",
        ) from error


def _vector(stored: object) -> NDArray[np.float32] | None:
    """What a row holds; None where damage that SQLite did not notice made it no vector."""
    if not isinstance(stored, bytes) or not stored or len(stored) % 4:
        return None
    vector = np.frombuffer(stored, np.float32)
    return vector if np.isfinite(vector).all() else None


def _key(model: str, text: Sequence[int]) -> bytes:
    ids = np.asarray(text, np.int32).tobytes()
    return hashlib.sha256(model.encode() + b"\0" + ids).digest()
