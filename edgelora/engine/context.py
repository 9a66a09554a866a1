"""A llama.cpp context: batches of tokens in, logits or hidden states out, one adapter set each."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgelora.engine import native
from edgelora.engine.model import Model, WeightedAdapter, resolve_weights
from edgelora.errors import EngineError


@dataclass(frozen=True)
class Row:
    """One token of a batch: its id, position, sequence, and whether its logits are wanted."""

    token: int
    position: int
    sequence: int
    output: bool = False


class Context:
    """KV cells and compute buffers of one model.

    Attributes:
        n_ctx: tokens that all sequences share (the KV cache is unified).
        n_batch: tokens that one decode takes at most.
        n_sequences: sequences that may be alive at once.
    """

    def __init__(self, model: Model, handle: Any, capture: _NodeCapture | None) -> None:
        self.model = model
        self.handle = handle
        # llama.cpp rounds up to 256 cells; GPT-2 has no positions beyond those it was trained with.
        self.n_ctx: int = min(llama_cpp.llama_n_ctx(handle), model.n_ctx_train)
        self.n_batch: int = llama_cpp.llama_n_batch(handle)
        self.n_sequences: int = llama_cpp.llama_n_seq_max(handle)
        self.n_decoded = 0
        self._capture = capture
        self._memory = llama_cpp.llama_get_memory(handle)
        self._batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)

    def close(self) -> None:
        """Free the native context and batch."""
        if self.handle is not None:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self.handle)
            self.handle = None
            self.model.in_use.pop(id(self), None)

    def apply(self, adapters: Sequence[WeightedAdapter]) -> None:
        """Make exactly these adapters active; the KV cache is cleared, it belonged to others."""
        active = resolve_weights(adapters)
        handles = [self.model.adapter(adapter.path) for adapter in active]
        self.model.in_use[id(self)] = frozenset(map(native.address, handles))
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * max(1, len(active)))(*handles)
        scales = (ctypes.c_float * max(1, len(active)))(*(a.weight for a in active))
        code = llama_cpp.llama_set_adapters_lora(self.handle, pointers, len(active), scales)
        if code != 0:
            raise EngineError("llama.cpp refused the adapter set", problems=native.recent_log())
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(self._memory, True)

    def copy_sequence(self, source: int, target: int) -> None:
        """Let `target` share all cells of `source`; nothing is copied in a unified cache."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def truncate(self, sequence: int, n_keep: int) -> None:
        """Forget the tokens of `sequence` from position `n_keep` on."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, n_keep, -1)

    def decode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Run one batch; returns the logits of the rows marked as output, (n_outputs, n_vocab).

        The array is llama.cpp's own buffer: it is overwritten by the next call.

        Raises:
            EngineError: a row that llama.cpp would abort on, or a failed decode.
        """
        self._fill(rows)
        with _interrupts_held() if self._capture else contextlib.nullcontext():
            code = llama_cpp.llama_decode(self.handle, self._batch)
        if code != 0:
            raise EngineError(
                f"llama_decode returned {code} for {len(rows)} tokens (context of {self.n_ctx})",
                problems=native.recent_log(),
                hint="Code 1 means that the context is full: use shorter texts.",
            )
        self.n_decoded += len(rows)
        n_outputs = sum(row.output for row in rows)
        if n_outputs == 0 or self._capture is not None:
            return np.empty((0, self.model.vocabulary.n_tokens), np.float32)
        logits = llama_cpp.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(logits, (n_outputs, self.model.vocabulary.n_tokens))

    def hidden(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Hidden states after the last norm of the output rows, (n_outputs, d) float32.

        Only for a context opened with `hidden=True`, where the head is never computed.
        """
        if self._capture is None:
            raise EngineError("this context was not opened for hidden states")
        self._capture.rows = None
        self.decode(rows)
        if self._capture.rows is None:
            raise EngineError(f"{self.model.base.architecture}: no node named result_norm")
        return self._capture.rows.reshape(-1, self.model.n_embd)

    def _fill(self, rows: Sequence[Row]) -> None:
        if not 0 < len(rows) <= self.n_batch:
            raise EngineError(f"a batch of {len(rows)} tokens, 1 to {self.n_batch} are possible")
        batch, n_vocab = self._batch, self.model.vocabulary.n_tokens
        for i, row in enumerate(rows):
            if not (0 <= row.token < n_vocab and 0 <= row.position < self.n_ctx):
                raise EngineError(f"token {row.token} at {row.position}: outside the model")
            if not 0 <= row.sequence < self.n_sequences:
                raise EngineError(f"sequence {row.sequence} of {self.n_sequences}")
            batch.token[i] = row.token
            batch.pos[i] = row.position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row.sequence
            batch.logits[i] = row.output
        batch.n_tokens = len(rows)


class _NodeCapture:
    """An eval callback that copies the node `result_norm` and stops the graph there."""

    def __init__(self) -> None:
        self.rows: NDArray[np.float32] | None = None
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)

    def _on_node(self, tensor: int, ask: bool, _user_data: int) -> bool:
        ggml = native.ggml_base()
        wanted = ggml.ggml_get_name(tensor) == b"result_norm"
        if ask:
            return bool(wanted)
        if not wanted:
            return True
        size_bytes = ggml.ggml_nbytes(tensor)
        self.rows = np.empty(size_bytes // 4, np.float32)
        ggml.ggml_backend_tensor_get(tensor, self.rows.ctypes.data, 0, size_bytes)
        return False


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back for the block: ctypes swallows what is raised inside a callback."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])


@contextlib.contextmanager
def open_context(
    model: Model,
    *,
    n_ctx: int = 4096,
    n_batch: int = 512,
    n_sequences: int = 32,
    hidden: bool = False,
    exact: bool = False,
) -> Iterator[Context]:
    """Open a context over `model`, closed at the end of the block.

    Args:
        n_ctx: KV cells; no more than the model was trained with are used.
        n_batch: tokens of one decode; every one of them may be an output.
        n_sequences: sequences alive at once.
        hidden: for `Context.hidden`, which stops before the head.
        exact: F32 KV and no flash attention, for comparisons.
    """
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = min(n_ctx, model.n_ctx_train)
    parameters.n_batch = parameters.n_ubatch = min(n_batch, parameters.n_ctx)
    parameters.n_outputs_max = parameters.n_outputs_max_per_seq = parameters.n_batch
    parameters.n_seq_max = min(n_sequences, 256, parameters.n_batch)
    parameters.kv_unified = True
    parameters.n_threads = parameters.n_threads_batch = model.options.threads()
    parameters.no_perf = True
    if exact:
        parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    capture = _NodeCapture() if hidden else None
    if capture is not None:
        parameters.cb_eval = capture.callback
    handle = llama_cpp.llama_init_from_model(model.handle, parameters)
    if not handle:
        raise EngineError("llama.cpp could not make a context", problems=native.recent_log())
    context = Context(model, handle, capture)
    try:
        yield context
    finally:
        context.close()
