"""A tiny quantised model decoded with llama.cpp's fastest kernels: run apart, for it may crash.

usage: python -m edgelora.engine.selftest

Exit status 0: the kernels work. A signal: this build of llama.cpp is broken on this CPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf.quants import quantize

_SIZE, _N_VOCAB, _N_TOKENS = 64, 64, 8
_KIND = gguf.GGMLQuantizationType.Q4_0


def main() -> int:
    """Write the model to a temporary folder, decode a batch; 0 if the logits are finite."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "selftest.gguf"
        _write_model(path)
        return 0 if _logits_are_finite(path) else 1


def _write_model(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(_N_TOKENS)
    writer.add_embedding_length(_SIZE)
    writer.add_feed_forward_length(_SIZE)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(_N_VOCAB)
    rng = np.random.default_rng(0)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name in ("token_embd", "output", *(f"blk.0.{part}" for part in parts)):
        values = rng.standard_normal((_SIZE, _SIZE)).astype(np.float32) / np.float32(8)
        writer.add_tensor(f"{name}.weight", quantize(values, _KIND), raw_dtype=_KIND)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_SIZE, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _logits_are_finite(path: Path) -> bool:
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.use_extra_bufts = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        return False
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = _N_TOKENS
    settings.n_threads = settings.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        return False
    ids = (llama_cpp.llama_token * _N_TOKENS)(*range(_N_TOKENS))
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, _N_TOKENS)) != 0:
        return False
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (_N_VOCAB,))
    return bool(np.isfinite(logits).all() and logits.std() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
