"""Another weight type for a base, through llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp

from edgelora.engine import native
from edgelora.errors import EngineError

FILE_TYPES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
}


def quantize(source: Path, target: Path, file_type: str, *, n_threads: int = 0) -> None:
    """Write `source` with another weight type (an already quantised file is requantised).

    Raises:
        EngineError: an unknown type, or llama.cpp failed.
    """
    if file_type not in FILE_TYPES:
        raise EngineError(f"unknown type {file_type}", hint=f"One of {', '.join(FILE_TYPES)}.")
    native.start()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[file_type]
    parameters.nthread = n_threads
    parameters.allow_requantize = True
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    if code != 0:
        raise EngineError(f"{source}: llama.cpp could not quantise it", problems=native.recent_log())
