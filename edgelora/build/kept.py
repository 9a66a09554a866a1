"""Files kept in the cache folder under a key, with a cap: the least recently used go first.

None is the only copy of anything. What is read back is for the caller to check.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgelora.embedding_cache import cache_folder
from edgelora.errors import EdgeLoRAError
from edgelora.files import TEMPORARY_PREFIX, locked, publish


@dataclass(frozen=True)
class KeptFile:
    """One file of a shelf."""

    path: Path
    size_bytes: int


@dataclass(frozen=True)
class Shelf:
    """A folder inside the cache folder.

    Every method raises EdgeLoRAError where the folder cannot be used.

    Attributes:
        suffix: of its files.
        cap_bytes: of all of them; a larger one is not kept.
    """

    name: str
    suffix: str
    cap_bytes: int

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return cache_folder() / self.name

    def fetch(self, key: str, out: Path) -> bool:
        """Copy a file to `out`, if it is there; it counts as used now."""
        with self._explained():
            try:
                shutil.copyfile(self._path(key), out)
            except FileNotFoundError:
                return False
            with contextlib.suppress(FileNotFoundError):  # dropped by another process just now
                os.utime(self._path(key))
            return True

    def read(self, key: str) -> bytes | None:
        """The bytes of a file, if it is there; it counts as used now."""
        with self._explained(), contextlib.suppress(FileNotFoundError):
            data = self._path(key).read_bytes()
            os.utime(self._path(key))
            return data
        return None

    def keep(self, key: str, size_bytes: int, write: Callable[[Path], object]) -> None:
        """Keep a file that `write` makes at a temporary path, once others have made room."""
        room = self.cap_bytes - size_bytes
        if room < 0:
            return
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / ".lock"):
                for leftover in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
                    leftover.unlink(missing_ok=True)
                others = [file for file in self.files() if file.path != self._path(key)]
                while others and sum(other.size_bytes for other in others) > room:
                    others.pop(0).path.unlink(missing_ok=True)
                with publish(self._path(key), force=True) as temporary:
                    write(temporary)

    def discard(self, key: str) -> None:
        """Delete one file, if it is there."""
        with self._explained():
            self._path(key).unlink(missing_ok=True)

    def files(self) -> list[KeptFile]:
        """What is kept, the least recently used first."""
        found = []
        with self._explained():
            for path in self.folder.glob(f"[!.]*{self.suffix}"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, path.name, KeptFile(path, status.st_size)))
        return [file for _, _, file in sorted(found, key=lambda entry: entry[:2])]

    def clear(self) -> int:
        """Delete all; returns how many there were."""
        found = self.files()
        with self._explained():
            for file in found:
                file.path.unlink(missing_ok=True)
        return len(found)

    def _path(self, key: str) -> Path:
        return self.folder / (key + self.suffix)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EdgeLoRAError(
                f"{self.folder}: this cache cannot be used ({error.strerror or error})",
                hint="Free disk space, or set EDGELORA_CACHE to another folder.",
            ) from error
