"""Adapter folders made tensor by tensor, and bases of a real model's shapes without its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from edgelora.adapters.base import Base
from edgelora.adapters.gguf_lora import LoraFile, check, open_lora
from edgelora.adapters.peft import convert, read_adapter
from edgelora.errors import EdgeLoRAError

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
SIZES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file; uint16 stands for the raw bits of BF16."""
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors.items():
        offsets = [len(data), len(data) + values.nbytes]
        dtype = SIZES.get(values.dtype.name, "F64")
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += values.tobytes()
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_folder(
    folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> Path:
    """A PEFT folder with exactly these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "adapter_model.safetensors", tensors)
    settings = CONFIG | {"target_modules": None} | dict(config or {})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(
    module: str, n_out: int, n_in: int, *, rank: int = 4, seed: int = 0, infix: str = ""
) -> dict[str, np.ndarray]:
    """lora_A (rank, n_in) and lora_B (n_out, rank) of one module under PEFT's names."""
    rng = np.random.default_rng(seed)
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A{infix}.weight": rng.standard_normal((rank, n_in), dtype=np.float32),
        f"{prefix}.lora_B{infix}.weight": rng.standard_normal((n_out, rank), dtype=np.float32),
    }


def hollow_base(path: Path, architecture: str, dims: pico.Dims, n_vocab: int) -> Path:
    """A base of these shapes whose weights are a hole in a sparse file: for its header only."""
    writer = GGUFWriter(None, architecture)
    writer.add_block_count(dims.n_layer)
    writer.add_embedding_length(dims.n_embd)
    writer.add_head_count(dims.n_head)
    writer.add_head_count_kv(dims.n_head_kv)
    size = 0
    for name, shape in pico.base_shapes(architecture, dims, n_vocab, tied=True).items():
        n_bytes = int(np.prod(shape)) * 4
        kind = GGMLQuantizationType.F32
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
        size += -(-n_bytes // 32) * 32
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + size + 32)
    return path


def converted(folder: Path, base: Base, **options: Any) -> LoraFile:
    """Convert to F32 (by default) and open, checked."""
    out = folder.parent / f"{folder.name}.gguf"
    convert(folder, base, out, **({"dtype": "f32"} | options))
    lora = open_lora(out)
    assert not check(lora, base)
    return lora


def warned(folder: Path, base: Base) -> tuple[LoraFile, str]:
    """Convert, and every warning."""
    messages: list[str] = []
    lora = converted(folder, base, warn=messages.append)
    return lora, "\n".join(messages)


def delta(lora: LoraFile, name: str) -> np.ndarray:
    """The update of one tensor in float64, (out, in)."""
    pair = lora.pair(name)
    return pair.scale * (pair.lora_b.astype(np.float64) @ pair.lora_a.astype(np.float64))


def gguf_rows(matrix: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows, one row at a time."""
    half = matrix.shape[0] // n_heads // 2
    order = [
        head * 2 * half + part * half + i
        for head in range(n_heads)
        for i in range(half)
        for part in (0, 1)
    ]
    return matrix[order]


def refusal(folder: Path, base: Base) -> EdgeLoRAError:
    """The error that reading this folder raises."""
    with pytest.raises(EdgeLoRAError) as caught:
        read_adapter(folder, base)
    return caught.value
