"""What a repository of the Hub holds: its files with sizes and hashes, at one commit, checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgelora import __version__
from edgelora.errors import HubError
from edgelora.hub.failures import explained
from edgelora.hub.offline import require_network

MODEL, DATASET = "model", "dataset"
MAX_SMALL_BYTES = 32 << 20  # what is not in LFS: text, hashed by git
_HUB = "https://huggingface.co"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 30.0
_N_RETRIES = 3


@dataclass(frozen=True)
class RepositoryFile:
    """One file of a repository at a commit.

    Attributes:
        path: inside the repository, with slashes; nothing local is named after it unchecked.
        sha256: of its bytes, for what the Hub keeps outside git (LFS, Xet); None for the rest.
        git_sha1: git's hash of the blob; for a file outside git, of the pointer to it.
    """

    path: str
    size_bytes: int
    sha256: str | None
    git_sha1: str


@dataclass(frozen=True)
class Repository:
    """A repository at one commit: what is read from it cannot change under one's hands.

    Attributes:
        id: `org/name`.
        kind: MODEL or DATASET.
        licence: as its card says; empty if it does not.
    """

    id: str
    kind: str
    commit: str
    files: tuple[RepositoryFile, ...]
    licence: str

    @property
    def page(self) -> str:
        """The address of its page for people."""
        return page_of(self.id, self.kind)

    @property
    def origin(self) -> str:
        """How an adapter records where it came from."""
        return f"{self.id}@{self.commit[:12]}"


def read_repository(name: str, kind: str = MODEL) -> Repository:
    """Ask the Hub what `org/name` holds now.

    The Hub is at HF_ENDPOINT, by default huggingface.co; a token of `hf auth login` or HF_TOKEN is
    sent. Nothing else is: no telemetry.

    Raises:
        HubError: no such repository, or an answer that is none.
        HubUnreachable: offline, or no connection, also after a few tries.
    """
    require_network(f"asking the Hub for {name}")
    with explained(name, page_of(name, kind)):
        from huggingface_hub.utils import http_backoff, validate_repo_id

        validate_repo_id(name)
        response = http_backoff(
            "GET",
            f"{endpoint()}/api/{kind}s/{name}",
            params={"blobs": "true"},
            headers=headers(),
            timeout=_TIMEOUT_S,
            max_retries=_N_RETRIES,
        )
        _raise_for_status(response)
        try:
            answer = response.json()
        except ValueError as error:
            raise HubError(f"{name}: the Hub's answer is not JSON") from error
    return _checked(name, kind, answer)


def endpoint() -> str:
    """HF_ENDPOINT, or the Hub's own address."""
    return (os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")


def page_of(name: str, kind: str) -> str:
    """The address of a repository's page for people."""
    return f"{endpoint()}/{'datasets/' if kind == DATASET else ''}{name}"


def headers() -> dict[str, str]:
    """What each request says of us: the version, and the token if a person has logged in."""
    from huggingface_hub import get_token

    token = get_token()
    said = {"user-agent": f"edgelora/{__version__}", "accept-encoding": "identity"}
    return {**said, "authorization": f"Bearer {token}"} if token else said


def _raise_for_status(response: Any) -> None:
    from huggingface_hub.utils import hf_raise_for_status

    hf_raise_for_status(response)


def _checked(name: str, kind: str, answer: object) -> Repository:
    if not isinstance(answer, Mapping):
        raise HubError(f"{name}: the Hub's answer is not a description of a repository")
    commit, siblings = answer.get("sha"), answer.get("siblings")
    if not isinstance(commit, str) or not _SHA1.fullmatch(commit):
        raise HubError(f"{name}: the Hub's answer names no commit")
    if not isinstance(siblings, list):
        raise HubError(f"{name}: the Hub's answer lists no files")
    files = tuple(file for entry in siblings if (file := _file(entry)) is not None)
    if siblings and not files:
        raise HubError(f"{name}: the Hub gives no hash of its files, so none can be checked")
    return Repository(name, kind, commit, files, _licence(answer))


def _file(entry: object) -> RepositoryFile | None:
    """One entry of the listing; None for what has no size or hash to hold it to."""
    if not isinstance(entry, Mapping):
        return None
    pointer = entry.get("lfs")
    lfs: Mapping[str, object] = pointer if isinstance(pointer, Mapping) else {}
    path, size = entry.get("rfilename"), lfs.get("size", entry.get("size"))
    git_sha1, sha256 = entry.get("blobId"), lfs.get("sha256")
    if not isinstance(path, str) or not isinstance(size, int) or isinstance(size, bool):
        return None
    if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        return None
    if not isinstance(git_sha1, str) or not _SHA1.fullmatch(git_sha1) or size < 0:
        return None
    if sha256 is None and size > MAX_SMALL_BYTES:
        return None
    return RepositoryFile(path, size, sha256, git_sha1)


def _licence(answer: Mapping[str, Any]) -> str:
    card = answer.get("cardData")
    licence = card.get("license") if isinstance(card, Mapping) else None
    values = licence if isinstance(licence, list) else [licence]
    return ", ".join(value for value in values if isinstance(value, str))
