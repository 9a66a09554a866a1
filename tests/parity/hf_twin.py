"""A transformers model with the weights of a pico GGUF, so that PEFT can be the judge."""

from __future__ import annotations

from pathlib import Path

import pico
import torch
import transformers

from edgelora.adapters.architectures import (
    ARCHITECTURES,
    module_of,
    n_permuted_heads,
    separate_rows,
)
from edgelora.adapters.base import Base, read_base
from edgelora.gguf_file import open_gguf

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "phi3": "Phi3",
    "gpt2": "GPT2",
}
NORMS = {
    "llama": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "gpt2": {"attn_norm": "ln_1", "ffn_norm": "ln_2"},
    "qwen3": {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
}


def hf_config(kind: str, dims: pico.Dims, n_vocab: int, *, tied: bool) -> dict[str, object]:
    """The config.json of a `kind` of CLASSES with pico's sizes."""
    name = f"{CLASSES[kind]}{'LMHead' if kind == 'gpt2' else 'ForCausalLM'}"
    name = name + "Model" if kind == "gpt2" else name
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": n_vocab}
    shared = {"architectures": [name], "model_type": kind, "tie_word_embeddings": tied, **ids}
    if kind == "gpt2":
        return shared | {
            "n_embd": dims.n_embd, "n_layer": dims.n_layer, "n_head": dims.n_head,
            "n_inner": dims.n_ff, "n_positions": dims.n_ctx, "n_ctx": dims.n_ctx,
            "layer_norm_epsilon": 1e-5,
        }  # fmt: skip
    return shared | {
        "hidden_size": dims.n_embd, "intermediate_size": dims.n_ff, "rms_norm_eps": 1e-5,
        "num_hidden_layers": dims.n_layer, "num_attention_heads": dims.n_head,
        "num_key_value_heads": dims.n_head_kv, "head_dim": dims.head_dim,
        "max_position_embeddings": dims.n_ctx, "rope_theta": 10000.0,
        "original_max_position_embeddings": dims.n_ctx,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }  # fmt: skip


def twin(path: Path, kind: str, dims: pico.Dims) -> torch.nn.Module:
    """The model of transformers that computes what llama.cpp computes with the F32 file `path`."""
    base = read_base(path)
    raw = hf_config(kind, dims, base.n_vocab, tied=not base.has_output)
    config = transformers.AutoConfig.for_model(**raw, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    found = model.load_state_dict(_state(path, base), strict=False)
    allowed = ("lm_head.weight", ".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
    assert not found.unexpected_keys
    assert all(key.endswith(allowed) for key in found.missing_keys), found.missing_keys
    return model


def _state(path: Path, base: Base) -> dict[str, torch.Tensor]:
    gguf = open_gguf(path)
    architecture = ARCHITECTURES[base.architecture]
    state = {}
    for tensor in gguf.tensors:
        stem, _, suffix = tensor.rpartition(".")
        values = gguf.array(tensor).copy()
        module = module_of(f"{stem}.weight", architecture) or _norm_module(stem, base.architecture)
        n_heads = n_permuted_heads(f"{stem}.weight", architecture, base.n_head, base.n_head_kv)
        values = separate_rows(values, n_heads) if n_heads else values
        if base.architecture == "gemma" and stem.endswith("norm"):
            values = values - 1.0
        if architecture.conv1d and values.ndim == 2 and stem.startswith("blk."):
            values = values.T.copy()
        state[f"{module}.{suffix}"] = torch.from_numpy(values)
    return state


def _norm_module(stem: str, architecture: str) -> str:
    is_gpt2 = architecture == "gpt2"
    if stem == "position_embd":
        return "transformer.wpe"
    if stem == "output_norm":
        return "transformer.ln_f" if is_gpt2 else "model.norm"
    _, layer, part = stem.split(".")
    names = NORMS["llama"] | NORMS.get(architecture, {})
    return f"{'transformer.h' if is_gpt2 else 'model.layers'}.{layer}.{names[part]}"
