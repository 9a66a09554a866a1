"""Files that are whole or absent: atomic publishing, hashes, locks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import filelock

from edgelora.errors import AlreadyExists, BankError

TEMPORARY_PREFIX = ".edgelora-tmp-"
_OWN_FILES = 256


@contextlib.contextmanager
def publish(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place.

    On any exception (Ctrl-C included) the temporary file is removed and nothing is published.

    Raises:
        AlreadyExists: `path` exists and `force` is false (checked before and after the work).
    """
    _refuse_existing(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}-{path.name}")
    try:
        yield temporary
        _refuse_existing(path, force)
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, force: bool = True) -> None:
    """Write `data` to `path` so that readers see the old bytes or the new, never a mixture."""
    with publish(path, force=force) as temporary:
        temporary.write_bytes(data)


def sha256_of(path: Path) -> str:
    """The hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (created if absent) across processes.

    Raises:
        BankError: another process held it for longer than `timeout_s`.
    """
    try:
        with filelock.FileLock(path, timeout=timeout_s):
            yield
    except filelock.Timeout as error:
        raise BankError(
            f"{path}: locked by another process for more than {timeout_s:g} s",
            hint="Wait for the other edgelora command to end, then run this one again.",
        ) from error


def allow_open_files(count: int) -> None:
    """Let this process have `count` files open beside its own, as far as the system permits.

    A mapped file counts as an open one; macOS begins with a limit of 256. Windows has none.
    """
    if os.name == "nt":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _refuse_existing(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise AlreadyExists(f"{path} exists already", hint="Choose another name or add --force.")


def _fsync(path: Path) -> None:
    # Opened for writing because Windows flushes only writable handles.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder as a file; its rename is durable by itself.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
