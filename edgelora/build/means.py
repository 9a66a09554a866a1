"""Sums of adapters with one coefficient for all, kept by the hash of the set that they add up.

The uniform mean over a bank is a candidate of every build, and at 500 adapters it takes minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from edgelora.adapters.merge import TOOL, merge_adapters
from edgelora.bank import seal
from edgelora.build.kept import Shelf
from edgelora.errors import InvalidFile

MEANS = Shelf("means", ".gguf", 512 << 20)


def write_sum(
    paths: Sequence[Path],
    hashes: Sequence[str],
    coefficient: float,
    out: Path,
    *,
    shelf: Shelf = MEANS,
    progress: Callable[[int], None] = lambda n_tensors: None,
) -> bool:
    """Write `coefficient` times the sum of the adapters, from the cache if it is there.

    The adapters are added in the order of their hashes, so that a set has one sum, byte for byte.

    Args:
        hashes: of what is in the adapters' files, one for each.
        progress: see merge.merge_adapters.

    Returns:
        Whether the cache had it.

    Raises:
        EdgeLoRAError: see merge.merge_adapters; or the cache cannot be written.
    """
    order = sorted(range(len(paths)), key=lambda i: hashes[i])
    key = _key([hashes[i] for i in order], coefficient)
    if shelf.fetch(key, out):
        with contextlib.suppress(InvalidFile, ValueError):  # ValueError: mmap of an empty file
            if seal.is_intact(out):
                return True
        out.unlink()
        shelf.discard(key)
    metadata = {seal.KEY: seal.PLACEHOLDER}
    ordered, coefficients = [paths[i] for i in order], [coefficient] * len(order)
    merge_adapters(ordered, coefficients, out, metadata=metadata, progress=progress)
    seal.seal(out)
    shelf.keep(key, out.stat().st_size, partial(shutil.copyfile, out))
    return False


def _key(hashes: Sequence[str], coefficient: float) -> str:
    """Everything that the bytes depend on, the linear algebra's versions included."""
    import numpy
    import scipy

    told = [TOOL, numpy.__version__, scipy.__version__, repr(coefficient), *hashes]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
