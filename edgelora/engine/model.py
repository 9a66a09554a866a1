"""A GGUF base opened by llama.cpp, checked in Python first, with the adapters loaded beside it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp

from edgelora.adapters import gguf_lora
from edgelora.adapters.base import Base, read_base
from edgelora.engine import amx, native
from edgelora.engine.loadable import refuse_unloadable
from edgelora.engine.needs import shortage
from edgelora.engine.threads import default_threads
from edgelora.engine.tokens import Vocabulary
from edgelora.errors import EngineError, IncompatibleAdapter, NotFound
from edgelora.memory import available_bytes, return_large_blocks


@dataclass(frozen=True)
class WeightedAdapter:
    """One adapter file and the weight with which it is applied."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class ModelOptions:
    """How a base is opened.

    Attributes:
        n_threads: 0 means what a self-test found (edgelora.engine.threads), or one for each core.
        low_ram: weights stay memory-mapped: llama.cpp's faster repacked copies are not made, and
            contexts take less (see open_context). None lets the free memory decide, with a
            warning where it does; an open model has what was decided.
        mlock: mapped weights are locked in RAM; a warning where the system refuses.
    """

    n_threads: int = 0
    low_ram: bool | None = False
    mlock: bool = False

    def threads(self) -> int:
        """The number that was asked for, or one for each physical core."""
        return self.n_threads or default_threads()


class Model:
    """An open base. A context manager; adapters are loaded once and freed with it.

    Attributes:
        warnings: what the user should know of how it was opened.
        has_windows: some layers attend to the last tokens only.
    """

    def __init__(
        self, base: Base, handle: Any, options: ModelOptions, warnings: tuple[str, ...] = ()
    ) -> None:
        self.base = base
        self.options = options
        self.warnings = warnings
        self.handle = handle
        self.vocabulary = Vocabulary(handle)
        self.n_embd: int = llama_cpp.llama_model_n_embd(handle)
        self.n_ctx_train: int = llama_cpp.llama_model_n_ctx_train(handle)
        self.has_windows: bool = llama_cpp.llama_model_n_swa(handle) > 0
        self.in_use: dict[int, frozenset[int]] = {}
        self._adapters: dict[tuple[Path, int, int], Any] = {}

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the adapters and the base; contexts must be closed before."""
        self.in_use.clear()
        for path, _, _ in list(self._adapters):
            self.unload(path)
        if self.handle is not None:
            handle, self.handle = self.handle, None
            native.free_model(handle)

    def adapter(self, path: Path) -> Any:
        """The native handle of an adapter file, checked against this base and loaded once.

        A file that has changed since is loaded anew; the old one stays until `unload`, for a
        context may have it applied.

        Raises:
            InvalidFile: not a sound GGUF LoRA.
            IncompatibleAdapter: made for another base, or names and shapes do not fit.
        """
        path = path.resolve()
        if not path.is_file():
            raise NotFound(f"{path}: no such adapter file")
        key = (path, path.stat().st_size, path.stat().st_mtime_ns)
        if key not in self._adapters:
            lora = gguf_lora.open_lora(path)
            problems = gguf_lora.check(lora, self.base) or gguf_lora.find_nonfinite(lora)
            if problems:
                raise IncompatibleAdapter(
                    f"{path}: does not fit {self.base.path.name}", problems=problems
                )
            with native.interrupts_held():
                handle = llama_cpp.llama_adapter_lora_init(self.handle, os.fsencode(path))
            if not handle:
                raise EngineError(
                    f"{path}: llama.cpp refused the adapter", problems=native.recent_log()
                )
            self._adapters[key] = handle
        return self._adapters[key]

    def unload(self, path: Path) -> None:
        """Free one adapter, in every version of the file that was loaded.

        Raises:
            EngineError: a context has it applied.
        """
        path = path.resolve()
        keys = [key for key in self._adapters if key[0] == path]
        applied = frozenset[int]().union(*self.in_use.values())
        if any(native.address(self._adapters[key]) in applied for key in keys):
            raise EngineError(f"{path}: a context has this adapter applied")
        for key in keys:
            llama_cpp.llama_adapter_lora_free(self._adapters.pop(key))

    @functools.cached_property
    def control_tokens(self) -> frozenset[str]:
        """The texts of the vocabulary's control tokens."""
        return frozenset(self.vocabulary.control_ids)


@contextlib.contextmanager
def open_model(path: Path, options: ModelOptions | None = None) -> Iterator[Model]:
    """Open a GGUF base memory-mapped.

    Raises:
        InvalidFile, UnsupportedFile: the header does not describe one whole model.
        EngineError: llama.cpp refused it; its own last lines are in the message.
    """
    base = read_base(path)
    refuse_unloadable(base)
    options, warnings = _decided(options or ModelOptions(), path)
    if options.low_ram:
        return_large_blocks()
    native.start()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.load_mode = (
        llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK if options.mlock else llama_cpp.LLAMA_LOAD_MODE_MMAP
    )
    broken = "" if options.low_ram else amx.warning()
    parameters.use_extra_bufts = not options.low_ram and not broken
    warnings += [broken] if broken else []
    handle = native.load_model(path, parameters)
    if not handle:
        raise EngineError(f"{path}: llama.cpp refused the model", problems=native.recent_log())
    if options.mlock:
        warnings += [line for line in native.recent_log(40) if "mlock" in line]
    model = Model(base, handle, options, tuple(warnings))
    try:
        yield model
    finally:
        model.close()


def _decided(options: ModelOptions, path: Path) -> tuple[ModelOptions, list[str]]:
    """The options without None, and why low_ram was chosen where the free memory chose it."""
    if options.low_ram is not None:
        return options, []
    reason = shortage(path, available_bytes())
    return replace(options, low_ram=bool(reason)), [reason] if reason else []


def resolve_weights(adapters: Sequence[WeightedAdapter]) -> list[WeightedAdapter]:
    """One entry for each file, weights summed: llama.cpp drops the second of two without a word.

    Weight 0 is left out: applying such an adapter costs time and changes nothing.

    Raises:
        EngineError: a weight that is not finite.
    """
    weights: dict[Path, float] = {}
    for adapter in adapters:
        path = adapter.path.resolve()
        weights[path] = weights.get(path, 0.0) + adapter.weight
    if not all(map(math.isfinite, weights.values())):
        raise EngineError("weights of adapters must be finite numbers")
    return [WeightedAdapter(path, weight) for path, weight in weights.items() if weight != 0.0]
