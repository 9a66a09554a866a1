"""What adapters need to know of a base model, from its GGUF header: shapes, heads and identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from edgelora.adapters.architectures import EMBEDDING, OUTPUT
from edgelora.errors import InvalidFile, UnsupportedFile
from edgelora.gguf_file import GGUFFile, open_gguf

# What decides the ids of a text. Special-token flags and templates differ between converters.
TOKENIZER_KEYS = ("model", "pre", "tokens", "scores", "merges")


@dataclass(frozen=True)
class BaseIdentity:
    """Which model a file is, whatever its quantisation.

    Two fine-tunes differ when a norm differs. A LoRA that was merged into a model leaves its norms
    alone, so it is NOT told apart from that model.

    Attributes:
        architecture: the GGUF's general.architecture.
        shapes: hash of the matrices' names and shapes.
        tokenizer: hash of the vocabulary, its scores and merges.
        norms: hash of the norm vectors, which llama.cpp keeps in F32 at every quantisation.
    """

    architecture: str
    shapes: str
    tokenizer: str
    norms: str

    @cached_property
    def id(self) -> str:
        """12 hex characters that stand for all four."""
        return _hash(
            part.encode() for part in (self.architecture, self.shapes, self.tokenizer, self.norms)
        )

    def describe(self) -> str:
        """One line for people who compare two identities."""
        return (
            f"{self.id} ({self.architecture}, shapes {self.shapes}, "
            f"tokenizer {self.tokenizer}, norms {self.norms})"
        )


@dataclass(frozen=True)
class Base:
    """A base model's header.

    Attributes:
        shapes: tensor name -> shape in numpy's order, (out, in) for a matrix.
        head_dim: rows of Q for each head.
        chat_template: the base's own template (jinja), if it has one.
        has_output: the head is a tensor of its own, not tied to the embedding.
    """

    path: Path
    architecture: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd: int
    head_dim: int
    n_vocab: int
    shapes: dict[str, tuple[int, ...]]
    chat_template: str | None
    name: str
    identity: BaseIdentity
    has_output: bool

    @property
    def head(self) -> str:
        """The tensor that makes logits: one of its own, or the embedding."""
        return OUTPUT if self.has_output else EMBEDDING


def read_base(path: Path) -> Base:
    """Read the header of a base GGUF; its weights stay on disk.

    Raises:
        InvalidFile: not a sound GGUF, or one without the numbers that a language model has.
        UnsupportedFile: a split file, an adapter, a vocabulary without weights.
    """
    gguf = open_gguf(path)
    metadata = gguf.metadata
    _refuse_other_kinds(path, metadata, gguf)
    architecture = str(metadata["general.architecture"])
    numbers = _Numbers(path, architecture, metadata)
    n_head = numbers.get("attention.head_count")
    n_embd = numbers.get("embedding_length")
    base = Base(
        path=path,
        architecture=architecture,
        n_layer=numbers.get("block_count"),
        n_head=n_head,
        n_head_kv=numbers.get("attention.head_count_kv", n_head),
        n_embd=n_embd,
        head_dim=numbers.get("attention.key_length", n_embd // max(n_head, 1)),
        n_vocab=gguf.tensors["token_embd.weight"].shape[0],
        shapes={name: info.shape for name, info in gguf.tensors.items()},
        chat_template=_text(metadata.get("tokenizer.chat_template")),
        name=_text(metadata.get("general.name")) or path.stem,
        identity=_identify(gguf, architecture),
        has_output=OUTPUT in gguf.tensors,
    )
    if numbers.problems:
        raise InvalidFile(f"{path}: not a language model", problems=numbers.problems)
    return base


def _refuse_other_kinds(path: Path, metadata: Mapping[str, Any], gguf: GGUFFile) -> None:
    n_parts = metadata.get("split.count", 0)
    if isinstance(n_parts, int) and n_parts > 1:
        raise UnsupportedFile(
            f"{path}: one of the {n_parts} parts of a split GGUF",
            hint="Join the parts first: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )
    kind = metadata.get("general.type", "model")
    if isinstance(kind, str) and kind == "adapter":
        raise UnsupportedFile(f"{path}: an adapter, not a base model", hint="Give it as adapter.")
    if not isinstance(kind, str) or kind != "model":
        raise UnsupportedFile(f"{path}: holds {kind!r}, not a base model")
    if not isinstance(metadata.get("general.architecture"), str):
        raise InvalidFile(f"{path}: names no architecture (general.architecture)")
    if not gguf.tensors:
        raise UnsupportedFile(f"{path}: a vocabulary without weights, not a base model")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InvalidFile(f"{path}: has no token_embd.weight, so it is no language model")


class _Numbers:
    """Reads whole numbers of the architecture, and keeps a list of those that are missing."""

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self.metadata = metadata
        self.problems: list[str] = []

    def get(self, key: str, default: int | None = None) -> int:
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(set(value)) == 1:
            value = int(value[0])  # some converters write one number for each block
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
            return value
        self.problems.append(
            f"{name} differs between blocks"
            if isinstance(value, np.ndarray | list)
            else f"{name} is {value!r}, expected a positive whole number"
        )
        return 1


def _identify(gguf: GGUFFile, architecture: str) -> BaseIdentity:
    matrices = sorted(
        (name, info.shape) for name, info in gguf.tensors.items() if len(info.shape) > 1
    )
    return BaseIdentity(
        architecture=architecture,
        shapes=_hash(f"{name} {shape}".encode() for name, shape in matrices),
        tokenizer=_hash(
            raw for key in TOKENIZER_KEYS for raw in gguf.metadata_bytes(f"tokenizer.ggml.{key}")
        ),
        norms=_hash(_norm_bytes(gguf)),
    )


def _norm_bytes(gguf: GGUFFile) -> Iterable[bytes]:
    for name, info in sorted(gguf.tensors.items()):
        if len(info.shape) == 1 and "norm" in name and info.ggml_type == GGMLQuantizationType.F32:
            yield name.encode()
            yield gguf.raw(name).tobytes()


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:12]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
