"""Stored weights to float32 by ggml's own to_float, the function that llama.cpp itself uses."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_in_numpy
from numpy.typing import NDArray

from edgelora.engine import native
from edgelora.errors import EngineError, UnsupportedFile

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """ggml.h: struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


def dequantize(
    raw: NDArray[np.uint8], kind: GGMLQuantizationType, out: NDArray[np.float32]
) -> None:
    """Write the values of whole blocks into `out`; F32 is copied.

    Types without a to_float in ggml are read by gguf's Python code.

    Args:
        raw: (n_blocks * type_size,) uint8, contiguous.
        out: (n_blocks * block_size,) float32, contiguous.

    Raises:
        UnsupportedFile: a type that neither ggml nor gguf turns into floats.
        ValueError: sizes or layouts that do not fit (a bug of the caller: C would overrun).
    """
    block_size, type_size = GGML_QUANT_SIZES[kind]
    if raw.dtype != np.uint8 or out.dtype != np.float32 or raw.size % type_size:
        raise ValueError(f"{raw.size} x {raw.dtype} to {out.dtype}: not whole {kind.name} blocks")
    if raw.size // type_size * block_size != out.size:
        raise ValueError(f"{raw.size} bytes of {kind.name} are not {out.size} values")
    if not (raw.flags.c_contiguous and out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("dequantize needs contiguous arrays, the second writable")
    if kind is GGMLQuantizationType.F32:
        out.reshape(-1)[:] = raw.reshape(-1).view("<f4")
        return
    to_float = _to_float(kind)
    if to_float is not None:
        to_float(raw.ctypes.data, out.ctypes.data, out.size)
        return
    out.reshape(-1)[:] = _in_numpy(raw.reshape(-1, type_size), kind).reshape(-1)


def is_readable(kind: GGMLQuantizationType) -> bool:
    """Whether `dequantize` knows this type."""
    if kind is GGMLQuantizationType.F32 or _to_float(kind) is not None:
        return True
    try:
        _in_numpy(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except UnsupportedFile:
        return False
    return True


@functools.cache
def _to_float(kind: GGMLQuantizationType) -> Any:
    """ggml's function for one type, None where it has none.

    Raises:
        EngineError: ggml describes the type otherwise than gguf does: another version of one.
    """
    library = native.ggml_base()
    library.ggml_type_name.argtypes = [ctypes.c_int]
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    if library.ggml_type_name(int(kind)) in (b"NONE", None):
        return None  # newer than this ggml, which looks up others without checking
    traits = library.ggml_get_type_traits(int(kind)).contents
    if not traits.to_float:
        return None
    if (traits.block_size, traits.type_size) != GGML_QUANT_SIZES[kind]:
        raise EngineError(
            f"{kind.name}: ggml has {traits.type_size} bytes for {traits.block_size} values, "
            f"gguf {GGML_QUANT_SIZES[kind][1]} for {GGML_QUANT_SIZES[kind][0]}",
            hint="Install the versions of llama-cpp-python and gguf that EdgeLoRA names.",
        )
    return _ToFloat(traits.to_float)


def _in_numpy(blocks: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[Any]:
    try:
        return np.asarray(dequantize_in_numpy(blocks, kind))
    except NotImplementedError as error:
        raise UnsupportedFile(f"weights of type {kind.name} cannot be read") from error
