"""Sums of adapters with one coefficient for all, kept by the hash of the set that they add up.

The uniform mean over a bank is a candidate of every build, and at 500 adapters it takes minutes.
The files lie in the cache folder, the least recently used go when a cap is reached, and none is the
only copy of anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelora.adapters.merge import TOOL, merge_adapters
from edgelora.bank import seal
from edgelora.embedding_cache import cache_folder
from edgelora.errors import EdgeLoRAError, InvalidFile
from edgelora.files import TEMPORARY_PREFIX, locked, publish

CAP_BYTES = 512 << 20
_SUFFIX = ".gguf"


@dataclass(frozen=True)
class KeptSum:
    """One file of the cache."""

    path: Path
    size_bytes: int


def means_folder() -> Path:
    """Where the sums are kept."""
    return cache_folder() / "means"


def write_sum(
    paths: Sequence[Path],
    hashes: Sequence[str],
    coefficient: float,
    out: Path,
    *,
    cap_bytes: int = CAP_BYTES,
    progress: Callable[[int], None] = lambda n_tensors: None,
) -> bool:
    """Write `coefficient` times the sum of the adapters, from the cache if it is there.

    The adapters are added in the order of their hashes, so that a set has one sum, byte for byte.

    Args:
        hashes: of what is in the adapters' files, one for each.
        cap_bytes: of all files in the cache; a larger sum is not kept.
        progress: see merge.merge_adapters.

    Returns:
        Whether the cache had it.

    Raises:
        EdgeLoRAError: see merge.merge_adapters; or the cache cannot be written.
    """
    order = sorted(range(len(paths)), key=lambda i: hashes[i])
    kept = means_folder() / (_key([hashes[i] for i in order], coefficient) + _SUFFIX)
    if _fetch(kept, out):
        return True
    metadata = {seal.KEY: seal.PLACEHOLDER}
    ordered, coefficients = [paths[i] for i in order], [coefficient] * len(order)
    merge_adapters(ordered, coefficients, out, metadata=metadata, progress=progress)
    seal.seal(out)
    with _explained():
        _keep(out, kept, cap_bytes)
    return False


def kept_sums() -> list[KeptSum]:
    """What the cache holds, the least recently used first."""
    found = []
    with _explained():
        for path in means_folder().glob(f"[!.]*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process just now
                status = path.stat()
                found.append((status.st_mtime_ns, KeptSum(path, status.st_size)))
    return [kept for _, kept in sorted(found, key=lambda pair: (pair[0], pair[1].path.name))]


def clear_sums() -> int:
    """Delete them all; returns how many there were."""
    found = kept_sums()
    with _explained():
        for kept in found:
            kept.path.unlink(missing_ok=True)
    return len(found)


def _key(hashes: Sequence[str], coefficient: float) -> str:
    """Everything that the bytes depend on, the linear algebra's versions included."""
    import numpy
    import scipy

    told = [TOOL, numpy.__version__, scipy.__version__, repr(coefficient), *hashes]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _fetch(kept: Path, out: Path) -> bool:
    """Copy from the cache; a damaged file is deleted and made anew."""
    with _explained():
        try:
            shutil.copyfile(kept, out)
        except FileNotFoundError:
            return False
        with contextlib.suppress(InvalidFile, ValueError):  # ValueError: mmap of an empty file
            if seal.is_intact(out):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(kept)
                return True
        out.unlink()
        kept.unlink(missing_ok=True)
    return False


def _keep(path: Path, kept: Path, cap_bytes: int) -> None:
    """A copy for the cache, whose least recently used files make room."""
    room = cap_bytes - path.stat().st_size
    if room < 0:
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    with locked(kept.parent / ".lock"):
        for leftover in kept.parent.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)
        others = kept_sums()
        while others and sum(other.size_bytes for other in others) > room:
            others.pop(0).path.unlink(missing_ok=True)
        with publish(kept, force=True) as temporary:
            shutil.copyfile(path, temporary)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EdgeLoRAError(
            f"{means_folder()}: the cache of means cannot be used ({error.strerror or error})",
            hint="Free disk space, or set EDGELORA_CACHE to another folder.",
        ) from error
