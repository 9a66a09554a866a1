"""Bases that are on this machine: in the folder of models, the Hugging Face cache, and Ollama."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelora.errors import EdgeLoRAError, NotFound

OLLAMA = "ollama:"
_MODEL_LAYER = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_MAX_MANIFEST_BYTES = 1 << 20
_LIBRARY = ("registry.ollama.ai", "library")


@dataclass(frozen=True)
class LocalBase:
    """A base that was found.

    Attributes:
        where: the folder of models, the Hugging Face cache or Ollama, in words.
        name: what `--base` takes: a path, or `ollama:name:tag`.
        architecture: of its header; what is wrong with it, in brackets, if it cannot be read.
    """

    where: str
    name: str
    path: Path
    size_bytes: int
    architecture: str


def find_bases(models: Path) -> list[LocalBase]:
    """Every GGUF that could be a base: of `models`, the Hugging Face cache, and Ollama, in order.

    Adapters are left out, and so are the projectors of models that see. Only headers are read, and
    no program is asked.
    """
    places = [("models", path, str(path)) for path in sorted(models.glob("*.gguf"))]
    # Two commits of a repository may hold links to one and the same file.
    hub = {path.resolve(): path for path in hub_cache().glob("models--*/snapshots/*/**/*.gguf")}
    places += [("Hugging Face", path, str(path)) for path in sorted(hub.values())]
    places += [("Ollama", path, f"{OLLAMA}{name}") for name, path in ollama_models()]
    found = [_described(*place) for place in places if place[1].is_file()]
    return [base for base in found if base is not None]


def hub_cache() -> Path:
    """Where huggingface_hub and transformers keep what they fetch."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def ollama_file(name: str) -> Path:
    """The GGUF behind a name of Ollama, `name` or `name:tag` (by default `latest`).

    Raises:
        NotFound: Ollama has no model of that name here (those it has are listed).
    """
    wanted = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    known = dict(ollama_models())
    if wanted in known:
        return known[wanted]
    raise NotFound(
        f"{OLLAMA}{name}: Ollama has no such GGUF model on this machine",
        problems=[f"{OLLAMA}{other}" for other in known],
        hint="Those above are there."
        if known
        else f"Looked in {' and '.join(map(str, ollama_folders()))}; OLLAMA_MODELS names another.",
    )


def ollama_folders() -> list[Path]:
    """OLLAMA_MODELS, or Ollama's default: the user's folder, and on Linux also the service's."""
    if given := os.environ.get("OLLAMA_MODELS"):
        return [Path(given).expanduser()]
    own = Path.home() / ".ollama" / "models"
    return [own, Path("/usr/share/ollama/.ollama/models")] if sys.platform == "linux" else [own]


def ollama_models() -> Iterator[tuple[str, Path]]:
    """Names as Ollama writes them, with the file of the model's weights.

    A manifest that is not one, or names no file that is there, is passed over: it is Ollama's.
    """
    for folder in ollama_folders():
        root = folder / "manifests"
        try:
            manifests = sorted(path for path in root.glob("*/*/*/*") if path.is_file())
        except OSError:  # the service's folder, which this user may not read
            continue
        for manifest in manifests:
            blob = _blob(folder, manifest)
            if blob is not None:
                yield _ollama_name(manifest.relative_to(root).parts), blob


def _ollama_name(parts: tuple[str, ...]) -> str:
    host, owner, model, tag = parts
    short = {_LIBRARY[0]: f"{owner}/{model}"}.get(host, f"{host}/{owner}/{model}")
    return f"{model if (host, owner) == _LIBRARY else short}:{tag}"


def _blob(folder: Path, manifest: Path) -> Path | None:
    try:
        if manifest.stat().st_size > _MAX_MANIFEST_BYTES:
            return None
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    layers = content.get("layers") if isinstance(content, Mapping) else None
    for layer in layers if isinstance(layers, list) else []:
        if not isinstance(layer, Mapping) or layer.get("mediaType") != _MODEL_LAYER:
            continue
        digest = _DIGEST.fullmatch(str(layer.get("digest")))
        path = folder / "blobs" / f"sha256-{digest[1]}" if digest else None
        return path if path is not None and path.is_file() else None
    return None


def _described(where: str, path: Path, name: str) -> LocalBase | None:
    from edgelora.gguf_file import open_gguf

    try:
        metadata = open_gguf(path).metadata
    except EdgeLoRAError as error:
        reason = error.what.removeprefix(f"{path}: ")
        return LocalBase(where, name, path, path.stat().st_size, f"(unusable: {reason})")
    architecture = str(metadata.get("general.architecture", ""))
    if metadata.get("general.type", "model") != "model" or architecture == "clip":
        return None
    return LocalBase(where, name, path, path.stat().st_size, architecture)
