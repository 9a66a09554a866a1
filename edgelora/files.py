"""Files that are whole or absent: atomic publishing, hashes, locks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from edgelora.errors import AlreadyExists, BankError, EdgeLoRAError

TEMPORARY_PREFIX = ".edgelora-tmp-"
_OWN_FILES = 256
_CLOCK_SLACK_S = 600.0  # that a file server's clock may be wrong


@contextlib.contextmanager
def publish(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place.

    On any exception (Ctrl-C included) the temporary file is removed and nothing is published. What
    a killed process left of the same file is removed first.

    Raises:
        AlreadyExists: `path` exists and `force` is false (checked before and after the work).
    """
    _refuse_existing(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = _temporary(path)
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


@contextlib.contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """A folder beside the file `path`, for what is needed until that is made; removed at the end.

    What a killed process left of one is removed first.

    Raises:
        EdgeLoRAError: another process of this machine has such a folder, so it makes that file now.
        OSError: nothing can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    folder = _temporary(path)
    folder.mkdir()
    try:
        _refuse_others(path, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files and folders for `path` whose process has ended on this machine.

    Those of a process that runs, or of another machine that shares the folder, are left alone.
    """
    for leftover, owner in _owned(path):
        if _is_abandoned(leftover, owner):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # another process has just removed it
                    leftover.unlink()


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


def _temporary(path: Path) -> Path:
    """A new name that tells whose it is: the machine's hash and the process's number."""
    owner = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f"{TEMPORARY_PREFIX}{owner}-{path.name}")


@functools.cache
def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _owned(path: Path) -> list[tuple[Path, int]]:
    """Temporary files and folders for `path` of this machine, each with its process's number."""
    start = re.escape(f"{TEMPORARY_PREFIX}{_machine()}-")
    name = re.compile(rf"{start}(\d{{1,9}})-\w{{8}}-{re.escape(path.name)}")
    found = ((entry, name.fullmatch(entry.name)) for entry in path.parent.iterdir())
    return [(entry, int(match[1])) for entry, match in found if match]


def _refuse_others(path: Path, own: Path) -> None:
    for other, owner in _owned(path):
        if other != own and other.is_dir():
            raise EdgeLoRAError(
                f"{path}: another process ({owner}) is making this file",
                hint=f"Wait for it, or choose another name. If it is none of EdgeLoRA's, delete "
                f"{other}",
            )


def _is_abandoned(leftover: Path, owner: int) -> bool:
    import psutil

    try:
        # A process that began after the file was written last has only taken the number over.
        started = psutil.Process(owner).create_time()
        return bool(started > leftover.stat().st_mtime + _CLOCK_SLACK_S)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


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
