"""The few llama.cpp and ggml calls that llama_cpp does not wrap, and its log, kept in memory."""

from __future__ import annotations

import collections
import ctypes
import functools
import logging
from typing import Any

import llama_cpp
from llama_cpp import _ggml
from llama_cpp._ctypes_extensions import load_shared_library

logger = logging.getLogger("edgelora.llama_cpp")
logger.addHandler(logging.NullHandler())
_recent: collections.deque[str] = collections.deque(maxlen=40)
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}


@llama_cpp.llama_log_callback
def _keep_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if line and line != ".":
        _recent.append(line)
        logger.log(_LOG_LEVELS.get(level, logging.DEBUG), line)


@functools.cache
def start() -> None:
    """Initialise llama.cpp once for this process and take over its log."""
    llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def recent_log(n_lines: int = 6) -> tuple[str, ...]:
    """The last lines that llama.cpp logged, for error messages."""
    return tuple(list(_recent)[-n_lines:])


@functools.cache
def ggml_base() -> Any:
    """libggml-base, with the signatures that reading a graph node needs."""
    library = load_shared_library("ggml-base", _ggml.libggml_base_path)
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_nbytes.argtypes = [ctypes.c_void_p]
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    library.ggml_backend_tensor_get.restype = None
    return library


def system_info() -> str:
    """llama.cpp's own line of compiled-in and detected CPU features."""
    start()
    text: bytes = llama_cpp.llama_print_system_info()
    return text.decode()
