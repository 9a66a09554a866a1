"""What the tests of gradients share: random examples, adapters at a trained point, differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pico
from gguf import GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile, open_lora
from edgelora.engine.score import TokenisedExample
from edgelora.gguf_file import open_gguf
from edgelora.gradient.decoder import Decoder, PassOptions
from edgelora.gradient.observers import CoefficientGradients
from edgelora.gradient.updates import Updates

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output")
# Every kind of model that the gradient covers: name -> architecture, its sizes, tied.
KINDS: dict[str, tuple[str, pico.Dims | None, bool]] = {
    "llama": ("llama", pico.Dims(n_head_kv=4), True),
    "mistral": ("llama", pico.Dims(n_head_kv=2), False),
    "one key head": ("llama", pico.Dims(n_head_kv=1), True),
    "qwen2": ("qwen2", None, False),
    "qwen3": ("qwen3", None, True),
}


def write_kind(kind: str, folder: Path) -> Path:
    """A pico base of KINDS in F32."""
    architecture, dims, tied = KINDS[kind]
    return pico.write_base(folder / "base.gguf", architecture, dims=dims, tied=tied)


def examples(
    n: int = 3, *, n_shared: int = 10, n_vocab: int = 300, seed: int = 0
) -> list[TokenisedExample]:
    """Texts of different lengths that begin alike."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(5, n_vocab, n_shared)
    made = []
    for line in range(n):
        prompt = np.concatenate([shared, rng.integers(5, n_vocab, 3 + 2 * line)])
        completion = rng.integers(5, n_vocab, 1 + line)
        made.append(TokenisedExample(tuple(prompt.tolist()), tuple(completion.tolist()), line))
    return made


def alter(
    base: Path,
    out: Path,
    *,
    keys: Mapping[str, str | int | float] | None = None,
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """A copy of an F32 base with other entries of its header, and other or more tensors."""
    gguf = open_gguf(base)
    writer = GGUFWriter(None, gguf.metadata["general.architecture"])
    changed = dict(keys or {})
    for key, value in gguf.metadata.items():
        if key in changed or key == "general.architecture":
            continue
        if gguf.metadata.value_type(key) is GGUFValueType.ARRAY:
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
        else:
            writer.add_key_value(key, value, gguf.metadata.value_type(key))
    kinds = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    for key, value in changed.items():
        writer.add_key_value(key, value, kinds[type(value)])
    values = {name: np.array(gguf.array(name)) for name in gguf.tensors} | dict(tensors or {})
    for name, array in values.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def adapters(base: Path, n: int = 3, size: float = 0.3) -> list[LoraFile]:
    """Adapters with different ranks and scales, on every matrix that the base has."""
    files = []
    for seed in range(n):
        path = base.with_name(f"{base.stem}-{seed}.gguf")
        rank, alpha = 2 + seed, 4.0 + seed
        pico.write_random_lora(
            path, base, rank=rank, alpha=alpha, parts=PARTS, seed=seed, size=size
        )
        files.append(open_lora(path))
    return files


def coefficient_gradients(
    decoder: Decoder, files: list[LoraFile], updates: Updates, options: PassOptions | None = None
) -> NDArray[np.float64]:
    """(k, n_tensors) on `examples()`."""
    gradients = CoefficientGradients(files)
    decoder.gradients(examples(), updates, gradients, options)
    return gradients.values


def slope(function: Callable[[float], float], step: float = 1e-5) -> float:
    """The central difference at zero."""
    return (function(step) - function(-step)) / (2 * step)


def relative(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """The L2 norm of the difference in units of the expected one's."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
