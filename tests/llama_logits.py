"""Logits from llama.cpp through its C API: F32 KV, no flash attention, one thread.

Weights are not repacked: the kernels for AMX return nonsense for rows of a single block of 32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray


def logits(base: Path, ids: Sequence[int], adapter: Path | None = None) -> NDArray[np.float32]:
    """The logits (n tokens, vocabulary) of every position of `ids`."""
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(base).encode(), options)
    assert model, base
    lora = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode()) if adapter else None
    assert lora or not adapter, adapter
    context = llama_cpp.llama_init_from_model(model, _context_params(len(ids)))
    assert context
    if lora:
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)
        assert not llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1))
    values = _decode(context, model, ids)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return values


def _context_params(n_tokens: int) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(n_tokens, 32)
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def _decode(context: object, model: object, ids: Sequence[int]) -> NDArray[np.float32]:
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i] = token, i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (n_vocab,)).copy()
        for i in range(len(ids))
    ]
    llama_cpp.llama_batch_free(batch)
    return np.stack(rows)
