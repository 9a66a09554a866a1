"""`model: "auto"`: the adapter whose dataset's prompts are most like this one, or the base.

Signatures hold embeddings of plain texts, so what is compared has to be the plain text of the
messages (`plain_prompt`), not the prompt that the template renders: in that the template's own
words move every embedding, and most prompts are taken for foreign.

    router = open_router(registry, scheduler, settings.bank)
    choice = await router.choose(plain_prompt(vocabulary, turns))

There is nothing to tell it when adapters come and go: it looks. Embedding is a pass of its own over
the prompt, under the base.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EdgeLoRAError, EngineError, InvalidFile
from edgelora.operators.routing import Cloud, Routes, Uncalibrated, fit_routes, make_cloud

if TYPE_CHECKING:
    from edgelora.engine.tokens import Vocabulary
    from edgelora.serve.scheduler import Scheduler
    from edgelora.serve.served import AdapterSet, Registry

Embed = Callable[[tuple[int, ...], int], Awaitable[NDArray[np.float32]]]
Known = tuple[Mapping[str, Cloud], Sequence[Cloud]]  # what may be chosen, and what else is known


@dataclass(frozen=True)
class Choice:
    """What answers, and why.

    Attributes:
        id: the adapter's, or the base's.
        similarity: of the nearest adapter, chosen or not: log-likelihood ratio in nats.
        threshold: what it had to exceed.
    """

    id: str
    adapters: AdapterSet
    similarity: float
    threshold: float


class Router:
    """Picks an adapter by a prompt's embedding.

    Args:
        embed: the embedding (d,) of a token sequence under the base, after a number of layers.
        served: the adapters that may be chosen now: id -> file.
        read: their datasets' prompts, and those of other known datasets; called in a thread.
        resolve: an id ("" for the base) to the model's id and its adapters.
    """

    def __init__(
        self,
        embed: Embed,
        served: Callable[[], Mapping[str, Path]],
        read: Callable[[Mapping[str, Path]], Known],
        resolve: Callable[[str], tuple[str, AdapterSet]],
    ) -> None:
        self._embed, self._served = embed, served
        self._read, self._resolve = read, resolve
        self._lock = threading.Lock()
        self._fitted: tuple[Mapping[str, Path], Routes | EdgeLoRAError] | None = None

    async def choose(self, prompt: Sequence[int]) -> Choice:
        """The adapter for a prompt.

        Args:
            prompt: ids of its plain text, not empty.

        Raises:
            Uncalibrated: nothing can be chosen by signatures here; it says why.
            EngineError: the base's embedding is not finite.
        """
        routes = await asyncio.to_thread(self._routes)
        embedding = await self._embed(tuple(prompt), routes.n_layers)
        if not np.isfinite(embedding).all():
            raise EngineError("the base's embedding of this prompt is not finite")
        name, similarity = routes.nearest(embedding)
        model_id, adapters = self._resolve(name if similarity > routes.threshold else "")
        return Choice(model_id, adapters, round(similarity, 4), round(routes.threshold, 4))

    def _routes(self) -> Routes:
        """What was fitted for the adapters that there are now."""
        with self._lock:
            served = dict(self._served())
            if self._fitted is None or self._fitted[0] != served:
                self._fitted = served, self._fit(served)
            routes = self._fitted[1]
        if isinstance(routes, EdgeLoRAError):
            raise Uncalibrated(f"model 'auto' cannot choose: {routes}")
        return routes

    def _fit(self, served: Mapping[str, Path]) -> Routes | EdgeLoRAError:
        from edgelora.adapters.merge import one_blas_thread

        try:
            with one_blas_thread():
                return fit_routes(*self._read(served))
        except EdgeLoRAError as error:
            return error  # told to every request until the adapters change


def open_router(registry: Registry, scheduler: Scheduler, bank: Path | None) -> Router:
    """The router of a server: every adapter that has a signature may be chosen.

    Args:
        bank: whose other signatures the threshold is calibrated with. So are those of a bank that
            an adapter's file lies in.
    """
    base_id = registry.base.identity.id

    async def embed(prompt: tuple[int, ...], n_layers: int) -> NDArray[np.float32]:
        vectors = await asyncio.wrap_future(scheduler.embed([prompt], (), n_layers))
        return np.asarray(vectors[0], np.float32)

    def served() -> dict[str, Path]:
        return {served.id: served.path for served in registry.adapters() if served.path}

    return Router(
        embed, served, lambda adapters: read_clouds(adapters, base_id, bank), registry.resolve
    )


def plain_prompt(vocabulary: Vocabulary, turns: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The ids of a conversation's plain text, as signatures are made of datasets' prompts."""
    from edgelora.datasets.records import Message
    from edgelora.summarise import embedded_ids, prompt_text

    messages = [Message(turn["role"], turn.get("content") or "") for turn in turns]
    return embedded_ids(vocabulary, prompt_text(messages))


def read_clouds(served: Mapping[str, Path], base_id: str, bank: Path | None) -> Known:
    """The prompts of the served adapters' datasets, and those of the other datasets of the banks.

    A signature lies beside its adapter, in a bank and where `edgelora build` wrote it. An adapter
    without one is left out: nothing tells what it is for.

    Raises:
        BankError, InvalidFile: a bank or a signature is damaged.
    """
    known: dict[Path, Cloud] = {}
    folders = {path.resolve().parent.parent for path in served.values()}
    for folder in sorted({*([bank.resolve()] if bank else []), *filter(_is_bank, folders)}):
        known |= _bank_clouds(folder, base_id)
    candidates = {}
    for name, path in served.items():
        cloud = known.pop(path.resolve(), None) or _cloud_beside(path, base_id)
        if cloud is not None:
            candidates[name] = cloud
    return candidates, list(known.values())


def _is_bank(folder: Path) -> bool:
    return (folder / "bank.json").is_file()


def _bank_clouds(folder: Path, base_id: str) -> dict[Path, Cloud]:
    from edgelora.bank.opening import open_bank

    return {
        record.path.resolve(): _cloud(record.path, base_id, record.source)
        for record in open_bank(folder).records()
        if record.base_id == base_id and record.has_signature
    }


def _cloud_beside(path: Path, base_id: str) -> Cloud | None:
    from edgelora.adapters.gguf_lora import open_lora
    from edgelora.bank.records import signature_path

    if not signature_path(path, base_id).is_file():
        return None
    return _cloud(path, base_id, str(open_lora(path).metadata.get("edgelora.source", "")))


def _cloud(adapter: Path, base_id: str, sources: str) -> Cloud:
    """The prompts of the dataset of one adapter; `sources` are separated by commas."""
    from edgelora.bank.records import signature_path, split_names
    from edgelora.signature import from_bytes

    path = signature_path(adapter, base_id)
    signature = from_bytes(path.read_bytes(), str(path))
    if signature.base_id != base_id:
        raise InvalidFile(f"{path}: made by the base {signature.base_id}")
    return make_cloud(signature.prompt, split_names(sources), signature.n_layers)
