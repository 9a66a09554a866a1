"""A llama.cpp context: batches of tokens in, logits or hidden states out, one adapter set each."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgelora.engine import native
from edgelora.engine.batch import Batch, Bounds
from edgelora.engine.capture import NodeCapture, node_of
from edgelora.engine.model import Model, WeightedAdapter, resolve_weights
from edgelora.engine.threads import Threads, stored_threads
from edgelora.errors import Aborted, ContextFull, EngineError

KV_TYPES = {
    "f32": llama_cpp.GGML_TYPE_F32,
    "f16": llama_cpp.GGML_TYPE_F16,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}
_Q8_0_BLOCK = 32
_LOW_RAM_UBATCH = 128


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
        n_ctx: tokens that one sequence may have.
        n_cells: tokens that all sequences together may have (the KV cache is unified).
        n_batch: tokens that one decode takes at most.
        n_outputs: tokens of one decode whose logits may be asked for.
        n_sequences: sequences that may be alive at once.
        kv_type: of keys and values, a key of `KV_TYPES`.
        batch: what `compute` runs.
        kept: tokens of sequence 0, as those who computed them said; [] after anything else.
    """

    def __init__(
        self,
        model: Model,
        handle: Any,
        capture: NodeCapture | None,
        n_ctx: int,
        n_outputs: int,
        kv_type: str,
    ) -> None:
        self.model = model
        self.handle = handle
        self.n_ctx = n_ctx
        self.kv_type = kv_type
        self.n_cells: int = llama_cpp.llama_n_ctx(handle)
        self.n_batch: int = llama_cpp.llama_n_batch(handle)
        self.n_outputs = n_outputs
        self.n_sequences: int = llama_cpp.llama_n_seq_max(handle)
        self.n_decoded = 0
        self.batch = Batch(self.n_batch)
        self.kept: list[int] = []
        self._bounds = Bounds(model.vocabulary.n_tokens, n_ctx, self.n_sequences, n_outputs)
        self._capture = capture
        self._memory = llama_cpp.llama_get_memory(handle)
        self._abort_flag = native.Flag()
        with native.interrupts_held():
            llama_cpp.llama_set_abort_callback(
                handle, self._abort_flag.callback, self._abort_flag.address
            )

    def close(self) -> None:
        """Free the native context."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            self.model.in_use.pop(id(self), None)
            with native.interrupts_held():
                llama_cpp.llama_free(handle)

    def apply(self, adapters: Sequence[WeightedAdapter], *, keep: bool = False) -> None:
        """Make exactly these adapters active.

        The KV cache is cleared, it belonged to others; with `keep` it stays, and the caller must
        let no sequence of one adapter set be continued under another.
        """
        active = resolve_weights(adapters)
        handles = [self.model.adapter(adapter.path) for adapter in active]
        self.model.in_use[id(self)] = frozenset(map(native.address, handles))
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * max(1, len(active)))(*handles)
        scales = (ctypes.c_float * max(1, len(active)))(*(a.weight for a in active))
        with native.interrupts_held():
            code = llama_cpp.llama_set_adapters_lora(self.handle, pointers, len(active), scales)
        if code != 0:
            raise EngineError("llama.cpp refused the adapter set", problems=native.recent_log())
        if not keep:
            self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self.kept = []
        llama_cpp.llama_memory_clear(self._memory, True)

    def copy_sequence(self, source: int, target: int, n: int = -1) -> None:
        """Let `target` share the first `n` cells of `source` (-1: all); nothing is copied."""
        self._refuse_sequences(source, target)
        self.kept = []
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, n)

    def truncate(self, sequence: int, n_keep: int) -> None:
        """Forget the tokens of `sequence` from position `n_keep` on.

        Raises:
            EngineError: a model that can only forget whole sequences.
        """
        self._refuse_sequences(sequence)
        self.kept = []
        if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, n_keep, -1):
            raise EngineError(f"{self.model.base.architecture}: cannot forget a part of a text")

    def remove_sequence(self, sequence: int) -> None:
        """Forget all tokens of `sequence`; cells that others share stay."""
        self._refuse_sequences(sequence)
        self.kept = []
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def save_sequence(self, sequence: int) -> NDArray[np.uint8]:
        """The cells of a sequence as bytes, for `load_sequence`."""
        self._refuse_sequences(sequence)
        data = np.empty(llama_cpp.llama_state_seq_get_size(self.handle, sequence), np.uint8)
        n = llama_cpp.llama_state_seq_get_data(self.handle, _bytes(data), data.nbytes, sequence)
        if n != data.nbytes:
            raise EngineError("llama.cpp could not save a sequence", problems=native.recent_log())
        return data

    def load_sequence(self, sequence: int, data: NDArray[np.uint8]) -> bool:
        """Give a sequence the cells that were saved of some sequence of this context.

        Returns:
            False if there are not enough free cells; the sequence is empty then.
        """
        self._refuse_sequences(sequence)
        self.kept = []
        n = llama_cpp.llama_state_seq_set_data(self.handle, _bytes(data), data.nbytes, sequence)
        if n != data.nbytes:
            self.remove_sequence(sequence)
        return bool(n == data.nbytes)

    def set_threads(self, threads: Threads) -> None:
        """Compute with other numbers of threads from the next decode on."""
        llama_cpp.llama_set_n_threads(self.handle, threads.decode, threads.prompt)

    def abort(self) -> None:
        """Stop the decode that runs now, and each after it until `resume`; from any thread."""
        self._abort_flag.set(True)

    def resume(self) -> None:
        """Let decodes run again."""
        self._abort_flag.set(False)

    def decode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Run one batch; returns the logits of the rows marked as output, (n_outputs, n_vocab).

        The array is llama.cpp's own buffer: it is overwritten by the next call.

        Raises:
            ContextFull: there are not enough free cells; nothing was computed.
            Aborted: `abort` was called.
            EngineError: a row that llama.cpp would abort on, or a failed decode.
        """
        self.batch.clear()
        for row in rows:
            self.batch.add(row.token, row.position, row.sequence, row.output)
        return self.compute()

    def compute(self) -> NDArray[np.float32]:
        """Run what was put into `batch`; returns and raises as `decode` does."""
        self.batch.check(self._bounds)
        self.kept = []
        capturing = self._capture.running() if self._capture else contextlib.nullcontext()
        with capturing, native.interrupts_held():
            code = llama_cpp.llama_decode(self.handle, self.batch.native)
        if code != 0:
            raise _failed_decode(code, self)
        self.n_decoded += self.batch.n_tokens
        n_outputs, n_vocab = self.batch.n_outputs, self.model.vocabulary.n_tokens
        if n_outputs == 0 or self._capture is not None:
            return np.empty((0, n_vocab), np.float32)
        logits = llama_cpp.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(logits, (n_outputs, n_vocab))

    def hidden(self, rows: Sequence[Row], n_layers: int = 0) -> NDArray[np.float32]:
        """Hidden states of one batch, float32; nothing that comes after them is computed.

        After early exit the layers above have no keys and values: `clear` before these sequences
        go on with more layers.

        Args:
            n_layers: 0 stops after the last norm: (n_outputs, d), the output rows. From 1 on it
                stops after that many layers, without a norm: (n, d), all rows.

        Raises:
            EngineError: not opened with `hidden=True`; not fewer layers than the model has; a
                model whose graph has no such node; and as `decode`.
        """
        if self._capture is None:
            raise EngineError("this context was not opened for hidden states")
        if not 0 <= n_layers < self.model.base.n_layer:
            raise EngineError(
                f"{self.model.base.path}: no early exit after {n_layers} layers, there are "
                f"{self.model.base.n_layer}",
                hint="0 means all of them.",
            )
        node = node_of(n_layers)
        with self._capture.at(node):
            self.decode(rows)
        values, d = self._capture.values(), self.model.n_embd
        n_rows = self.batch.n_tokens if n_layers else self.batch.n_outputs
        if values is None or len(values) != n_rows * d:
            found = "no such node" if values is None else f"{len(values)} values"
            raise EngineError(
                f"{self.model.base.architecture}: {n_rows} rows of {node} were expected, {found}"
            )
        return values.reshape(n_rows, d)

    def _refuse_sequences(self, *sequences: int) -> None:
        for sequence in sequences:
            if not 0 <= sequence < self.n_sequences:
                raise EngineError(f"sequence {sequence} of {self.n_sequences}")


def _bytes(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _failed_decode(code: int, context: Context) -> EngineError:
    """What llama_decode's code means."""
    what = f"llama_decode returned {code} for {context.batch.n_tokens} tokens"
    if code == 1:
        return ContextFull(
            f"{what}: the context of {context.n_cells} is full", hint="Use shorter texts."
        )
    if code == 2:
        return Aborted(f"{what}: it was stopped")
    return EngineError(what, problems=native.recent_log())


@contextlib.contextmanager
def open_context(
    model: Model,
    *,
    n_ctx: int = 4096,
    n_batch: int = 512,
    n_sequences: int = 32,
    hidden: bool = False,
    exact: bool = False,
    kv_type: str = "",
    n_cells: int = 0,
    n_ubatch: int = 0,
    n_outputs: int = 0,
) -> Iterator[Context]:
    """Open a context over `model`, closed at the end of the block.

    Args:
        n_ctx: tokens of one sequence; no more than the model was trained with are used.
        n_batch: tokens of one decode.
        n_sequences: sequences alive at once.
        hidden: for `Context.hidden`, which stops before the head.
        exact: kv_type f32, for comparisons.
        kv_type: of keys and values, a key of `KV_TYPES`; with f32 there is no flash attention,
            which rounds to F16 by itself. "" is f16, or q8_0 where the model was opened with
            low_ram and its heads are whole blocks of that type.
        n_cells: KV cells that all sequences share; 0 means n_ctx.
        n_ubatch: tokens of one pass through the layers; 0 means n_batch, with low_ram 128.
        n_outputs: tokens of one decode that may be outputs; 0 means all of them.

    Raises:
        EngineError: settings that this model does not allow.
    """
    n_ctx = min(n_ctx, model.n_ctx_train)
    n_ubatch = n_ubatch or (_LOW_RAM_UBATCH if model.options.low_ram else n_batch)
    parameters = _parameters(
        max(n_ctx, n_cells), n_batch, n_ubatch, n_sequences, n_outputs or n_batch
    )
    threads = _threads(model)
    parameters.n_threads, parameters.n_threads_batch = threads.decode, threads.prompt
    kv_type = "f32" if exact else kv_type or _default_kv_type(model)
    _set_kv_type(parameters, kv_type)
    capture = NodeCapture() if hidden else None
    if capture is not None:
        parameters.cb_eval = capture.callback
    with native.interrupts_held():
        handle = llama_cpp.llama_init_from_model(model.handle, parameters)
    if not handle:
        raise EngineError("llama.cpp could not make a context", problems=native.recent_log())
    # llama.cpp rounds cells up to 256; GPT-2 has no positions beyond those it was trained with.
    n_positions = n_ctx if n_cells else min(llama_cpp.llama_n_ctx(handle), model.n_ctx_train)
    context = Context(model, handle, capture, n_positions, parameters.n_outputs_max, kv_type)
    try:
        yield context
    finally:
        context.close()


def _threads(model: Model) -> Threads:
    """As many as were asked for; else as the self-test found, or one for each core."""
    n = model.options.threads()
    stored = None if model.options.n_threads else stored_threads(model.base.architecture)
    return stored or Threads(n, n)


def _parameters(
    n_cells: int, n_batch: int, n_ubatch: int, n_sequences: int, n_outputs: int
) -> llama_cpp.llama_context_params:
    """llama.cpp's parameters, none larger than what it is a part of."""
    parameters: llama_cpp.llama_context_params = llama_cpp.llama_context_default_params()
    parameters.n_ctx = n_cells
    parameters.n_batch = min(n_batch, n_cells)
    parameters.n_ubatch = min(n_ubatch, parameters.n_batch)
    parameters.n_seq_max = min(n_sequences, 256, parameters.n_batch)
    # llama.cpp asserts that each sequence may have an output.
    parameters.n_outputs_max = min(max(n_outputs, parameters.n_seq_max), parameters.n_batch)
    parameters.n_outputs_max_per_seq = parameters.n_outputs_max
    parameters.kv_unified = True
    parameters.no_perf = True
    return parameters


def _default_kv_type(model: Model) -> str:
    is_blocked = model.base.head_dim % _Q8_0_BLOCK == 0
    return "q8_0" if model.options.low_ram and is_blocked else "f16"


def _set_kv_type(parameters: llama_cpp.llama_context_params, kv_type: str) -> None:
    if kv_type not in KV_TYPES:
        raise EngineError(f"no KV type {kv_type}", hint=f"There are {', '.join(KV_TYPES)}.")
    if kv_type == "f32":
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.type_k = parameters.type_v = KV_TYPES[kv_type]
