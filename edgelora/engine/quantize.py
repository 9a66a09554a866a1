"""Another weight type for a base, through llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import llama_cpp

from edgelora.adapters.base import read_base
from edgelora.engine import native
from edgelora.engine.model import ModelOptions
from edgelora.errors import EngineError

FILE_TYPES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
}


def quantize(source: Path, target: Path, file_type: str, *, n_threads: int = 0) -> None:
    """Write `source` with another weight type (an already quantised file is requantised).

    Args:
        n_threads: 0 means one for each physical core.

    Raises:
        InvalidFile, UnsupportedFile: the source's header does not describe one whole model.
        EngineError: an unknown type, the source as target, or llama.cpp failed.
    """
    if file_type not in FILE_TYPES:
        raise EngineError(f"unknown type {file_type}", hint=f"One of {', '.join(FILE_TYPES)}.")
    if target.exists() and target.samefile(source):
        raise EngineError(f"{source}: cannot be quantised onto itself")
    read_base(source)
    native.start()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[file_type]
    parameters.nthread = ModelOptions(n_threads).threads()
    parameters.allow_requantize = True
    code = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)
    )
    if code != 0:
        raise EngineError(
            f"{source}: llama.cpp could not quantise it", problems=native.recent_log()
        )
