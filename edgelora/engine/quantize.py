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
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
}


def quantize(
    source: Path, target: Path, file_type: str, *, n_layers: int = 0, n_threads: int = 0
) -> None:
    """Write `source` with another weight type (an already quantised file is requantised).

    Args:
        n_layers: keep only the first so many layers, for measurements; 0 keeps all.
        n_threads: 0 means one for each physical core.

    Raises:
        InvalidFile, UnsupportedFile: the source's header does not describe one whole model.
        EngineError: an unknown type, the source as target, more layers than there are, or llama.cpp
            failed.
    """
    if file_type not in FILE_TYPES:
        raise EngineError(f"unknown type {file_type}", hint=f"One of {', '.join(FILE_TYPES)}.")
    if target.exists() and target.samefile(source):
        raise EngineError(f"{source}: cannot be quantised onto itself")
    n_there = read_base(source).n_layer
    if not 0 <= n_layers <= n_there:
        raise EngineError(f"{source}: the first {n_layers} of {n_there} layers cannot be kept")
    native.start()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[file_type]
    parameters.nthread = ModelOptions(n_threads).threads()
    parameters.allow_requantize = True
    dropped = range(n_layers, n_there) if n_layers else ()
    ends = (ctypes.c_int32 * (len(dropped) + 1))(*dropped, -1)  # llama.cpp reads up to the -1
    if dropped:
        parameters.prune_layers = ends
    with native.interrupts_held():
        code = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)
        )
    if code != 0:
        raise EngineError(
            f"{source}: llama.cpp could not quantise it", problems=native.recent_log()
        )
