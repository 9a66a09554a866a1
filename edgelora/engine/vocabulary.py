"""A vocabulary without a model: a GGUF that llama.cpp tokenises with, checked in Python first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from edgelora.engine import native
from edgelora.engine.tokens import Vocabulary
from edgelora.errors import EngineError, InvalidFile, UnsupportedFile
from edgelora.gguf_file import open_gguf

_PREFIX = "tokenizer.ggml."
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@contextlib.contextmanager
def open_vocabulary(path: Path) -> Iterator[Vocabulary]:
    """Open the SentencePiece vocabulary of a GGUF for the block; its weights, if any, stay on disk.

    Raises:
        NotFound, InvalidFile: no sound GGUF, or a vocabulary that llama.cpp would not survive;
            every problem is listed.
        UnsupportedFile: a vocabulary of another kind than SentencePiece.
        EngineError: llama.cpp refused it; its own last lines are in the message.
    """
    _check(path)
    native.start()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.vocab_only = True
    handle = native.load_model(path, parameters)
    if not handle:
        raise EngineError(f"{path}: llama.cpp refused it", problems=native.recent_log())
    try:
        yield Vocabulary(handle)
    finally:
        native.free_model(handle)


def _check(path: Path) -> None:
    metadata = open_gguf(path).metadata
    kind = metadata.get(f"{_PREFIX}model")
    if kind != "llama":
        raise UnsupportedFile(f"{path}: a vocabulary of the kind {str(kind)[:40]!r}, not llama")
    problems = _problems({name: metadata.get(name) for name in metadata if name[:9] == "tokenizer"})
    if metadata.get("general.architecture") != "llama":
        problems.append("general.architecture is not llama")
    if problems:
        raise InvalidFile(f"{path}: not a sound vocabulary", problems=problems)


def _problems(entries: dict[str, Any]) -> list[str]:
    tokens = entries.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens:
        return [f"{_PREFIX}tokens is not a list of texts"]
    problems = []
    for name, dtype in (("scores", np.float32), ("token_type", np.int32)):
        values = entries.get(f"{_PREFIX}{name}")
        if not isinstance(values, np.ndarray) or values.dtype != dtype:
            problems.append(f"{_PREFIX}{name} is not a list of {np.dtype(dtype).name}")
        elif len(values) != len(tokens):
            problems.append(f"{len(values)} {name} for {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        problems.append(f"{len(tokens) - len(set(tokens))} tokens come twice")
    missing = _BYTES - set(tokens)
    if missing:
        problems.append(f"{len(missing)} of the 256 byte tokens are missing")
    for name in ("bos", "eos", "unknown"):
        token = entries.get(f"{_PREFIX}{name}_token_id")
        if type(token) is not int or not 0 <= token < len(tokens):
            problems.append(f"{_PREFIX}{name}_token_id is {token!r}, not a token")
    return problems
