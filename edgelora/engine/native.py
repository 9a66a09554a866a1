"""The few llama.cpp and ggml calls that llama_cpp does not wrap, and its log, kept in memory."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import llama_cpp
from llama_cpp import _ggml
from llama_cpp._ctypes_extensions import load_shared_library

logger = logging.getLogger("edgelora.llama_cpp")
logger.addHandler(logging.NullHandler())
_recent: collections.deque[str] = collections.deque(maxlen=40)
# ggml's debug lines (one for each tensor and graph input) stay below what -v shows.
_LOG_LEVELS = {1: 5, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}


# Said of every tensor of every adapter where the base's weights are repacked, and harmless.
_ONCE = "cannot use buft"
_said: set[str] = set()
# Said of a batch that was stopped on request, or that comes again when cells are free.
_EXPECTED = (
    "failed with error 1", "compute status: 1", "removing memory module entries", "ret = 2",
    "failed to find a memory slot",
)  # fmt: skip


def keep_line(level: int, line: str) -> None:
    """Remember and log one line of llama.cpp; its warnings for each tensor are told once."""
    if _ONCE in line:
        if _ONCE in _said:
            return
        _said.add(_ONCE)
        level, line = 2, f"{line} (and so for other tensors)"
    if any(text in line for text in _EXPECTED):
        level = 2
    line = line.lstrip(".")  # dots are llama.cpp's progress bar
    if not line:
        return
    if level > 1:
        _recent.append(line)
    logger.log(_LOG_LEVELS.get(level, logging.DEBUG), line)


def _keep_log(level: int, text: bytes, _user_data: object) -> None:
    keep_line(level, text.decode("utf-8", "replace").rstrip())


_log_callback = llama_cpp.llama_log_callback(_keep_log)


@functools.cache
def start() -> None:
    """Initialise llama.cpp once for this process and take over its log."""
    llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
    with interrupts_held():
        llama_cpp.llama_backend_init()


@contextlib.contextmanager
def interrupts_held() -> Iterator[Sequence[object]]:
    """Hold Ctrl-C back for the block, a native call that logs or calls back; raise it at the end.

    Python would raise it in the callback (the log's too), where ctypes prints it and forgets it.
    The list given is empty until Ctrl-C was pressed. Python handles signals in the main thread
    only: in another one nothing need be held.
    """
    previous = signal.getsignal(signal.SIGINT)
    held: list[tuple[int, FrameType | None]] = []
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield []
        return
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])


def load_model(path: Path, parameters: Any) -> Any:
    """A model's native handle, falsy where llama.cpp refuses it; Ctrl-C ends the loading."""
    with interrupts_held() as interrupts:
        going_on = llama_cpp.llama_progress_callback(lambda _share, _data: not interrupts)
        parameters.progress_callback = going_on
        return llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)


def free_model(handle: Any) -> None:
    """Free what `load_model` gave."""
    with interrupts_held():
        llama_cpp.llama_model_free(handle)


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


class Flag:
    """A flag that llama.cpp asks between two nodes of a graph, as its abort callback.

    A callback in Python would take the interpreter's lock a thousand times for each decode. What
    is wanted of it (is the byte there set?) is what C's strlen answers for a string of that byte.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)
        self.address = ctypes.c_void_p(ctypes.addressof(self._text))
        library = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
        self.callback = ctypes.cast(library.strlen, llama_cpp.ggml_abort_callback)

    def set(self, value: bool) -> None:
        """Raise or lower it, from any thread."""
        self._text[0] = b"\x01" if value else b"\x00"


def system_info() -> str:
    """llama.cpp's own line of compiled-in and detected CPU features."""
    start()
    text: bytes = llama_cpp.llama_print_system_info()
    return text.decode()


def address(handle: Any) -> int:
    """A native pointer as a number: ctypes' own objects are not hashable."""
    return int(ctypes.cast(handle, ctypes.c_void_p).value or 0)


def cpu_libraries() -> list[Path]:
    """The files of llama.cpp's CPU kernels."""
    return sorted(Path(_ggml.libggml_base_path).glob("*ggml-cpu*"))


def version() -> str:
    """The version of llama-cpp-python."""
    return str(llama_cpp.__version__)
