"""x W^T by ggml's own kernels on stored weights, as llama.cpp computes it: rows of x are rounded.

A kernel for blocks of integers rounds x to blocks of 8 bits first (ggml's Q8_0, Q8_1 or Q8_K), one
for BF16 to BF16: the product is off by half a percent or less (relative L2), as in llama.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from llama_cpp import _ggml
from numpy.typing import NDArray

from edgelora.engine import amx, native
from edgelora.errors import EngineError

# Types whose kernels are tried here: those that files are made in. ggml has no product, and would
# crash, with some of its others.
_NAMES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
KINDS = frozenset(GGMLQuantizationType[name] for name in _NAMES.split())
# A larger matrix, such as the head, is not repacked: a copy of its blocks is kept in memory.
MAX_REPACKED_BYTES = 64 << 20

_ALIGNMENT = 32  # bytes; ggml-impl.h: TENSOR_ALIGNMENT
_REPACKED = (b"AMX", b"CPU_REPACK")  # ggml's types of buffers for such copies, the faster first
_N_TENSORS = 8  # room for those of one product
_CPU = 0  # ggml-backend.h: GGML_BACKEND_DEVICE_TYPE_CPU

_P, _N = ctypes.c_void_p, ctypes.c_size_t


class _InitParams(ctypes.Structure):
    """ggml.h: struct ggml_init_params."""

    _fields_ = (("mem_size", _N), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (_P, (_InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_tensor_overhead": (_N, ()),
    "ggml_graph_overhead_custom": (_N, (_N, ctypes.c_bool)),
    "ggml_new_tensor_2d": (_P, (_P, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_new_graph_custom": (_P, (_P, _N, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_backend_cpu_buffer_from_ptr": (_P, (_P, _N)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_buffer_get_base": (_P, (_P,)),
    "ggml_backend_buffer_get_size": (_N, (_P,)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (_P,)),
    "ggml_backend_buft_get_alloc_size": (_N, (_P, _P)),
    "ggml_backend_buft_alloc_buffer": (_P, (_P, _N)),
    "ggml_backend_tensor_alloc": (ctypes.c_int, (_P, _P, _P)),
    "ggml_backend_tensor_set": (None, (_P, _P, _N, _N)),
    "ggml_backend_supports_op": (ctypes.c_bool, (_P, _P)),
    "ggml_backend_graph_compute": (ctypes.c_int, (_P, _P)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_get_device": (_P, (_P,)),
    "ggml_backend_dev_backend_reg": (_P, (_P,)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, ctypes.c_char_p)),
}


class Products:
    """ggml's CPU backend as a product with matrices; its work memory lives as long as this does."""

    def __init__(self, n_threads: int) -> None:
        ggml = _ggml_base()
        self._rooms: list[_Room] = []
        self._room_of: dict[tuple[GGMLQuantizationType, int, int], _Room | None] = {}
        self._backend = _ggml.libggml.ggml_backend_init_by_type(_CPU, None)
        if not self._backend:
            raise EngineError("ggml has no CPU backend here", problems=native.recent_log())
        weakref.finalize(self, _close, self._backend, self._rooms)
        device = ggml.ggml_backend_get_device(self._backend)
        self._registry = ggml.ggml_backend_dev_backend_reg(device)
        self._procedure("set_n_threads", None, _P, ctypes.c_int)(self._backend, n_threads)
        if not amx.warning():
            self._rooms += map(_Room, self._buffer_types(device, _REPACKED))

    def times(
        self,
        x: NDArray[np.floating[Any]],
        raw: NDArray[np.uint8],
        kind: GGMLQuantizationType,
        *,
        repacked: bool = False,
    ) -> NDArray[np.float32]:
        """x W^T, (t, out) float32.

        Args:
            x: (t, in) float32.
            raw: (out, bytes of a row) uint8, the stored blocks of W.
            repacked: rearrange a copy of the blocks first, for kernels that are faster on it.

        Raises:
            ValueError: a type that is not of KINDS, shapes that do not fit, or a matrix that cannot
                be repacked: see `repacks` (bugs of the caller: C would overrun or crash).
            EngineError: ggml could not compute it.
        """
        x, raw = np.ascontiguousarray(x), np.ascontiguousarray(raw)
        y = _empty(len(x), len(raw))
        ggml = _ggml_base()
        room = self._room_for(raw, kind, x.shape[1]) if repacked else None
        if repacked and not room:
            raise ValueError(f"ggml has no such product with {kind.name}, repacked")
        with self._product(x, raw, kind, y, room) as made:
            if not ggml.ggml_backend_supports_op(self._backend, made.node):
                raise ValueError(f"ggml has no such product with {kind.name}")
            if room:
                with native.interrupts_held():  # it logs
                    ggml.ggml_backend_tensor_set(made.weights, raw.ctypes.data, 0, raw.nbytes)
            graph = ggml.ggml_new_graph_custom(made.context, _N_TENSORS, False)
            ggml.ggml_build_forward_expand(graph, made.node)
            code = ggml.ggml_backend_graph_compute(self._backend, graph)
        if code:
            raise EngineError(f"ggml could not multiply: code {code}", problems=native.recent_log())
        return y

    def repacks(self, raw: NDArray[np.uint8], kind: GGMLQuantizationType, n_in: int) -> bool:
        """Whether ggml has kernels for this matrix, repacked, on this CPU; see `times`."""
        return self._room_for(raw, kind, n_in) is not None

    def _room_for(
        self, raw: NDArray[np.uint8], kind: GGMLQuantizationType, n_in: int
    ) -> _Room | None:
        """Where the copy of this matrix is kept: of the type that llama.cpp would take.

        A row of a single block is never repacked: ggml's kernels for AMX return nonsense then.
        """
        if raw.nbytes > MAX_REPACKED_BYTES or n_in == GGML_QUANT_SIZES[kind][0]:
            return None
        key = (kind, len(raw), n_in)
        if key not in self._room_of:
            supports = _ggml_base().ggml_backend_supports_op
            x, y = _empty(1, n_in), _empty(1, len(raw))

            def has_kernels(room: _Room) -> bool:
                with self._product(x, raw, kind, y, room) as made:
                    return bool(supports(self._backend, made.node))

            self._room_of[key] = next(filter(has_kernels, self._rooms), None)
        return self._room_of[key]

    @contextmanager
    def _product(
        self,
        x: NDArray[np.floating[Any]],
        raw: NDArray[np.uint8],
        kind: GGMLQuantizationType,
        y: NDArray[np.float32],
        room: _Room | None,
    ) -> Iterator[_Product]:
        """The product in a context of its own, over the memory of the arrays."""
        _refuse_misfits(x, raw, kind)
        ggml = _ggml_base()
        size = _N_TENSORS * ggml.ggml_tensor_overhead()
        size += ggml.ggml_graph_overhead_custom(_N_TENSORS, False)
        context = ggml.ggml_init(_InitParams(size, None, True))
        buffers: list[int] = []

        def place(tensor: int, array: NDArray[Any]) -> None:
            # A buffer has to begin at a round address; a tensor in it may begin anywhere.
            address, past = array.ctypes.data, array.ctypes.data % _ALIGNMENT
            buffer = ggml.ggml_backend_cpu_buffer_from_ptr(address - past, array.nbytes + past)
            buffers.append(buffer)
            ggml.ggml_backend_tensor_alloc(buffer, tensor, address)

        try:
            weights = ggml.ggml_new_tensor_2d(context, int(kind), x.shape[1], len(raw))
            rows = ggml.ggml_new_tensor_2d(context, GGMLQuantizationType.F32, x.shape[1], len(x))
            if room:
                buffer = room.buffer_for(weights)
                base = ggml.ggml_backend_buffer_get_base(buffer)
                ggml.ggml_backend_tensor_alloc(buffer, weights, base)
            else:
                place(weights, raw)
            place(rows, x)
            node = ggml.ggml_mul_mat(context, weights, rows)
            place(node, y)
            yield _Product(context, weights, node)
        finally:
            for buffer in buffers:
                ggml.ggml_backend_buffer_free(buffer)
            ggml.ggml_free(context)

    def _procedure(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function of the backend that has no symbol of its own."""
        full = f"ggml_backend_{name}".encode()
        address = _ggml_base().ggml_backend_reg_get_proc_address(self._registry, full)
        if not address:
            raise EngineError(f"ggml's CPU backend has no {full.decode()}")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def _buffer_types(self, device: int, names: Iterable[bytes]) -> list[int]:
        """Those of the backend's extra types of buffers that it has here, in the order of names."""
        found = self._procedure("dev_get_extra_bufts", ctypes.POINTER(_P), _P)(device)
        listed = itertools.takewhile(bool, (found[i] for i in itertools.count())) if found else ()
        types = {_ggml_base().ggml_backend_buft_name(buffer): buffer for buffer in listed}
        return [types[name] for name in names if name in types]


@dataclass(frozen=True)
class _Product:
    """A ggml context with two tensors of a graph: W, and x W^T."""

    context: int
    weights: int
    node: int


class _Room:
    """A buffer for repacked weights, as large as the largest matrix so far."""

    def __init__(self, buffer_type: int) -> None:
        self._type = buffer_type
        self._buffer = 0

    def buffer_for(self, tensor: int) -> int:
        """A buffer that can hold this tensor's copy; what lay in it is gone."""
        ggml = _ggml_base()
        size_bytes = ggml.ggml_backend_buft_get_alloc_size(self._type, tensor)
        if self._buffer and ggml.ggml_backend_buffer_get_size(self._buffer) >= size_bytes:
            return self._buffer
        self.free()
        self._buffer = ggml.ggml_backend_buft_alloc_buffer(self._type, size_bytes) or 0
        if not self._buffer:
            raise EngineError(f"no memory for {size_bytes / 1e6:,.0f} MB of repacked weights")
        return self._buffer

    def free(self) -> None:
        """Give it back."""
        if self._buffer:
            _ggml_base().ggml_backend_buffer_free(self._buffer)
        self._buffer = 0


@functools.cache
def _ggml_base() -> Any:
    """libggml-base with the signatures of the functions used here."""
    native.start()
    library = native.ggml_base()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    make = _ggml.libggml.ggml_backend_init_by_type
    make.restype, make.argtypes = _P, (ctypes.c_int, ctypes.c_char_p)
    return library


def _close(backend: int, rooms: list[_Room]) -> None:
    for room in rooms:
        room.free()
    _ggml_base().ggml_backend_free(backend)


def _empty(n_rows: int, n_columns: int) -> NDArray[np.float32]:
    """An array without values that begins where ggml has its results begin."""
    size_bytes = 4 * n_rows * n_columns
    memory = np.empty(size_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size_bytes].view(np.float32).reshape(n_rows, n_columns)


def _refuse_misfits(
    x: NDArray[np.floating[Any]], raw: NDArray[np.uint8], kind: GGMLQuantizationType
) -> None:
    if kind not in KINDS:
        raise ValueError(f"no product by ggml with {kind.name}")
    block_size, type_size = GGML_QUANT_SIZES[kind]
    if x.dtype != np.float32 or raw.dtype != np.uint8 or x.ndim != 2 or raw.ndim != 2:
        raise ValueError(f"{x.ndim}-d {x.dtype} by {raw.ndim}-d {raw.dtype}")
    if not (x.size and raw.size and raw.flags.c_contiguous and x.flags.c_contiguous):
        raise ValueError("a product of arrays that are empty or not contiguous")
    if x.shape[1] * type_size != raw.shape[1] * block_size:
        raise ValueError(f"{x.shape} by rows of {raw.shape[1]} bytes of {kind.name}")
