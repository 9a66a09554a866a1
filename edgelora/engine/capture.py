"""A node of llama.cpp's graph handed over as it is computed; nothing after it is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgelora.engine import native

RESULT_NORM = "result_norm"


def node_of(n_layers: int) -> str:
    """The node after `n_layers` layers: llama.cpp counts from 0; 0 means all and the last norm."""
    return f"l_out-{n_layers - 1}" if n_layers else RESULT_NORM


class NodeCapture:
    """An eval callback that copies one node and stops the graph there: `result_norm`, or another.

    Where llama.cpp cuts a graph into parts (for a BLAS library beside the CPU), those after the
    stop are computed, for nothing.
    """

    def __init__(self) -> None:
        self._wanted = RESULT_NORM
        self._parts: list[NDArray[np.float32]] = []
        self._error: BaseException | None = None
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)

    @contextlib.contextmanager
    def at(self, node: str) -> Iterator[None]:
        """Stop at `node` in the block."""
        self._wanted = node
        try:
            yield
        finally:
            self._wanted = RESULT_NORM

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around one decode.

        What was raised inside the callback is raised here: ctypes would print and forget it.
        """
        self._parts, self._error = [], None
        yield
        if self._error is not None:
            raise self._error

    def values(self) -> NDArray[np.float32] | None:
        """What the last decode copied, flat, ubatch after ubatch; None if no node had the name."""
        parts, self._parts = self._parts, []
        if len(parts) > 1:
            return np.concatenate(parts)
        return parts[0] if parts else None

    def _on_node(self, tensor: int, ask: bool, _user_data: int) -> bool:
        """Whether a node is wanted (`ask`), or whether to go on after it; never raises into C."""
        try:
            if self._error is not None:
                return ask  # stops after this node
            ggml = native.ggml_base()
            wanted = bool(ggml.ggml_get_name(tensor) == self._wanted.encode())
            if ask or not wanted:
                return wanted if ask else True
            size_bytes = ggml.ggml_nbytes(tensor)
            rows = np.empty(size_bytes // 4, np.float32)
            ggml.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, size_bytes)
            self._parts.append(rows)
        except BaseException as error:
            self._error = error
        return False
