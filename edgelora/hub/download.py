"""One file from the Hub: resumed across cut lines and ended processes, hashed, whole or absent.

huggingface_hub (2.4) starts a file anew in each process and compares sizes only; so its requests
are used here, while the part that has come, and its hash, are ours. Everything comes by plain HTTP,
which the Hub serves for Xet's files too.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from edgelora.errors import HubError
from edgelora.files import publish, sha256_of
from edgelora.hub.failures import explained
from edgelora.hub.offline import require_network
from edgelora.hub.repository import Repository, RepositoryFile, endpoint, headers

PART_SUFFIX = ".part"
SPARE_BYTES = 64 << 20
_N_TRIES = 5  # without a new byte
_PAUSE_S = 1.0
_TIMEOUT_S = 30.0

# What has come, and what is to come, in bytes.
Progress = Callable[[int, int], None]


def fetch(
    repository: Repository,
    file: RepositoryFile,
    target: Path,
    *,
    progress: Progress = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Path:
    """Put one file of a repository at `target`; a file that is there and right is left as it is.

    What has come lies beside `target`, under the name of its hash, until it is whole: after a
    Ctrl-C, a crash or a cut line the next call asks for the rest only. The caller keeps others
    from fetching the same file at the same time (files.locked).

    Args:
        warn: told of each cut of the line that is got over.

    Raises:
        HubError: other bytes than the repository's listing says (nothing of them is kept), too
            little room on the disk, or a refusal; see also read_repository.
        HubUnreachable: the line stays dead; what has come stays for the next time.
    """
    if target.is_file() and is_same(file, target):
        return target
    require_network(f"fetching {file.path}")
    digest = file.sha256 or file.git_sha1
    part = target.with_name(f"{target.name}.{digest[:16]}{PART_SUFFIX}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_parts(target, part)
        _require_room(file, target.parent, part)
        try:
            with explained(repository.id, repository.page):
                _receive(repository, file, part, progress, warn)
        finally:
            if part.is_file() and part.stat().st_size == 0 < file.size_bytes:
                part.unlink()
        if not part.is_file() or not is_same(file, part):
            part.unlink(missing_ok=True)
            raise HubError(
                f"{repository.id}: {file.path}: its bytes are not those that the Hub promised "
                f"({'sha256' if file.sha256 else 'git hash'} {digest[:16]}...): thrown away",
                hint="Run the same command again. If it fails again, the file or a proxy between "
                "is broken: tell the repository's owner.",
            )
        with publish(target, force=True) as temporary:
            os.replace(part, temporary)
    except OSError as error:
        raise HubError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def is_same(file: RepositoryFile, path: Path) -> bool:
    """Whether a local file has the bytes that a repository lists."""
    if path.stat().st_size != file.size_bytes:
        return False
    if file.sha256 is not None:
        return sha256_of(path) == file.sha256
    data = path.read_bytes()
    header = b"blob %d\0" % len(data)
    return hashlib.sha1(header + data, usedforsecurity=False).hexdigest() == file.git_sha1


def _receive(
    repository: Repository,
    file: RepositoryFile,
    part: Path,
    progress: Progress,
    warn: Callable[[str], None],
) -> None:
    """Append to `part` until it is whole; where the line is cut, the rest is asked for again."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    n_tries = 0
    while True:
        with part.open("ab") as opened:
            before = opened.tell()
            try:
                if before < file.size_bytes:
                    _receive_rest(repository, file, opened, progress)
                return
            except HfHubHTTPError:
                raise
            except HTTPError as error:
                n_tries = 1 if opened.tell() > before else n_tries + 1
                if n_tries >= _N_TRIES:
                    raise
                warn(
                    f"{file.path}: the line was cut after {opened.tell():,} of "
                    f"{file.size_bytes:,} bytes ({error}); going on from there"
                )
        time.sleep(_PAUSE_S)


def _receive_rest(
    repository: Repository, file: RepositoryFile, opened: IO[bytes], progress: Progress
) -> None:
    """One request for all that is missing. A server that knows no ranges sends the whole anew."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(
        repository.id,
        file.path,
        repo_type=repository.kind,
        revision=repository.commit,
        endpoint=endpoint(),
    )
    asked = {**headers(), "range": f"bytes={opened.tell()}-"} if opened.tell() else headers()
    with http_stream_backoff(
        "GET",
        url,
        headers=asked,
        timeout=_TIMEOUT_S,
        retry_on_exceptions=(),
        retry_on_status_codes=(429, 502, 503, 504),
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            _empty(opened)
        for chunk in response.iter_bytes():
            if opened.tell() + len(chunk) > file.size_bytes:
                _empty(opened)
                raise HubError(
                    f"{repository.id}: {file.path}: more comes than the {file.size_bytes:,} bytes "
                    "that the Hub promised: thrown away"
                )
            opened.write(chunk)
            progress(opened.tell(), file.size_bytes)


def _empty(opened: IO[bytes]) -> None:
    opened.seek(0)
    opened.truncate()


def _remove_parts(target: Path, kept: Path) -> None:
    """Remove what has come of other versions of this file."""
    for other in target.parent.glob(f"{glob.escape(target.name)}.*{PART_SUFFIX}"):
        if other != kept:
            other.unlink(missing_ok=True)


def _require_room(file: RepositoryFile, folder: Path, part: Path) -> None:
    present = part.stat().st_size if part.is_file() else 0
    missing, free = file.size_bytes - present, shutil.disk_usage(folder).free
    if missing + SPARE_BYTES > free:
        raise HubError(
            f"{folder}: {file.path} needs {missing / 1e9:.2f} GB more and {free / 1e9:.2f} GB "
            "are free",
            hint="Make room, or choose another folder.",
        )
