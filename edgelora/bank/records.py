"""BankRecord: what the bank knows about one adapter, read from its GGUF header alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.errors import IncompatibleAdapter, InvalidFile

if TYPE_CHECKING:
    from edgelora.adapters.base import BaseIdentity
    from edgelora.adapters.gguf_lora import LoraFile

SUFFIX = ".gguf"
SIGNATURE_SUFFIX = ".signature.safetensors"
_PREFIX = "edgelora."
_NUMBERS = ("size_bytes", "n_tensors")
_REQUIRED = ("base.id", "base.architecture", "base.shapes", "base.tokenizer", "base.norms")


def signature_path(adapter: Path, base_id: str) -> Path:
    """Where the signature of an adapter's dataset lies: beside its file."""
    return adapter.with_name(f"{adapter.name.removesuffix(SUFFIX)}.{base_id}{SIGNATURE_SUFFIX}")


def split_names(text: str) -> frozenset[str]:
    """Several sources or categories, as records have them: separated by commas."""
    return frozenset(name for part in text.split(",") if (name := part.strip()))


@dataclass(frozen=True)
class BankRecord:
    """One adapter of a bank; text fields are empty where nothing was recorded.

    Attributes:
        path: its GGUF LoRA file.
        base_id, base_architecture, base_shapes, base_tokenizer, base_norms: the identity of the
            base that it was converted for (hex hashes).
        template: the prompt template that it was trained with, "chat" for the base's own.
        ranks: lowest and highest rank of its pairs.
        n_tensors: base tensors that it updates.
        dtype: the type of its factors, e.g. "f16" ("mixed" if they differ).
        source_sha256: of the files that it was converted from.
        content_sha256: of the GGUF itself (see edgelora.bank.seal).
        signatures: ids of the bases for which there is a signature.
    """

    name: str
    path: Path
    size_bytes: int
    base_id: str
    base_architecture: str
    base_shapes: str
    base_tokenizer: str
    base_norms: str
    template: str
    source: str
    licence: str
    category: str
    description: str
    origin: str
    ranks: tuple[int, int]
    n_tensors: int
    dtype: str
    source_sha256: str
    content_sha256: str
    created_by: str
    signatures: tuple[str, ...] = ()

    @property
    def has_signature(self) -> bool:
        """Whether there is a signature made by the base that the adapter is for."""
        return self.base_id in self.signatures

    @property
    def sources(self) -> frozenset[str]:
        """What its data was made from; two adapters that share one are siblings."""
        return split_names(self.source)

    @property
    def categories(self) -> frozenset[str]:
        """What kinds of task it is."""
        return split_names(self.category)

    def is_sibling(self, other: BankRecord) -> bool:
        """Whether both were made from one source, or are the same."""
        return self.name == other.name or bool(self.sources & other.sources)

    @property
    def base(self) -> BaseIdentity:
        """The recorded identity of its base."""
        from edgelora.adapters.base import BaseIdentity

        return BaseIdentity(
            self.base_architecture, self.base_shapes, self.base_tokenizer, self.base_norms
        )

    def require(self, identity: BaseIdentity) -> None:
        """Refuse a base other than the adapter's.

        Raises:
            IncompatibleAdapter: with both identities.
        """
        if self.base_id != identity.id:
            raise IncompatibleAdapter(
                f"{self.name}: made for another base",
                problems=[
                    f"the adapter's base: {self.base.describe()}",
                    f"the base in use:    {identity.describe()}",
                ],
                hint="Use the base that the adapter was made for, or add its source again.",
            )

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON can hold it."""
        return {**asdict(self), "path": str(self.path), "has_signature": self.has_signature}


@dataclass(frozen=True)
class Facts:
    """What a person says of an adapter; None where nothing was said.

    Attributes:
        template: the prompt template that it was trained with, "chat" for the base's own.
        source: of its data; several are separated by ", ".
        origin: the Hub's repository and commit that it was fetched from, `org/name@commit`.
    """

    template: str | None = None
    source: str | None = None
    licence: str | None = None
    category: str | None = None
    description: str | None = None
    origin: str | None = None

    def items(self) -> Iterator[tuple[str, str]]:
        """The facts that were given and are not empty."""
        return ((key, value) for key, value in vars(self).items() if value)


def read_record(path: Path) -> BankRecord:
    """The record of a GGUF LoRA that `bank add` wrote.

    Raises:
        InvalidFile: damaged, not a LoRA, or without the metadata that the bank writes.
    """
    from edgelora.adapters.gguf_lora import open_lora

    lora = open_lora(path)
    missing = [key for key in _REQUIRED if not lora.metadata.get(_PREFIX + key)]
    if missing:
        raise InvalidFile(
            f"{path}: not an adapter that `edgelora bank add` wrote",
            problems=[f"no {_PREFIX}{key} in its metadata" for key in missing],
            hint="Add the PEFT folder that it was made from.",
        )
    return _record(path, lora)


def _record(path: Path, lora: LoraFile) -> BankRecord:
    ranks = [lora.rank(name) for name in lora.names]
    texts: dict[str, Any] = {
        field: str(lora.metadata.get(_PREFIX + field, ""))
        for field in (
            *("template", "source", "licence", "category", "description", "origin"),
            *("source_sha256", "content_sha256", "created_by"),
        )
    }
    identity: dict[str, Any] = {
        key.replace(".", "_"): str(lora.metadata[_PREFIX + key]) for key in _REQUIRED
    }
    return BankRecord(
        name=path.name.removesuffix(SUFFIX),
        path=path,
        size_bytes=path.stat().st_size,
        ranks=(min(ranks), max(ranks)),
        n_tensors=len(ranks),
        dtype=_dtype(lora),
        **identity,
        **texts,
    )


def _dtype(lora: LoraFile) -> str:
    kinds = {info.ggml_type.name.lower() for info in lora.gguf.tensors.values()}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def dump_record(record: BankRecord) -> str:
    """The record as the index stores it: without what the folder says (path, signatures)."""
    values = asdict(record)
    del values["path"], values["signatures"]
    return json.dumps(values)


def load_record(text: str, path: Path, signatures: tuple[str, ...]) -> BankRecord:
    """The inverse of dump_record; ValueError, KeyError or TypeError where `text` is not one."""
    values: Mapping[str, Any] = json.loads(text)
    stored = {
        field.name: values[field.name] for field in fields(BankRecord)[:-1] if field.name != "path"
    }
    stored["ranks"] = tuple(map(int, stored["ranks"]))
    for key, value in stored.items():
        if key != "ranks" and type(value) is not (int if key in _NUMBERS else str):
            raise TypeError(f"{key} is {value!r}")
    if stored["name"] != path.name.removesuffix(SUFFIX):
        raise ValueError(f"the record of {stored['name']}")
    return replace(BankRecord(path=path, **stored), signatures=signatures)
