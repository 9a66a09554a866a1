"""A GGUF LoRA back to a PEFT folder that `peft` loads and that computes the same."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.architectures import (
    ARCHITECTURES,
    EMBEDDING,
    Architecture,
    module_of,
    n_permuted_heads,
    separate_rows,
)
from edgelora.adapters.base import Base
from edgelora.adapters.gguf_lora import LoraFile, check, find_nonfinite
from edgelora.adapters.lora import LoraPair
from edgelora.adapters.safetensors_file import save_safetensors
from edgelora.errors import IncompatibleAdapter, UnsupportedFile
from edgelora.files import publish, write_atomic


def write_peft(
    lora: LoraFile,
    base: Base,
    folder: Path,
    *,
    base_model: str = "",
    one_rank: bool = False,
    force: bool = False,
) -> None:
    """Write `folder`/adapter_model.safetensors and adapter_config.json.

    Factors keep the file's precision (F16 and F32; BF16 and Q8_0 become F32). Ranks and scales
    that differ between modules go into rank_pattern and alpha_pattern.

    Args:
        base_model: what PEFT should call the base (default: the base GGUF's own name).
        one_rank: for loaders that read r and lora_alpha alone (vLLM, llama.cpp's converter):
            factors get zeros up to the largest rank and patterns are empty. Where scales differ,
            they go into lora_b, which becomes F32.

    Raises:
        IncompatibleAdapter: the adapter does not fit this base, or holds NaN.
        UnsupportedFile: an architecture, or tensors, that PEFT's modules cannot name.
        AlreadyExists: the folder holds an adapter and `force` is false.
    """
    architecture = _architecture(lora)
    problems = check(lora, base) or find_nonfinite(lora)
    if problems:
        raise IncompatibleAdapter(f"{lora.path}: does not fit {base.path}", problems=problems)
    modules = _modules(lora, architecture)
    rank, alpha = _one_rank(lora) if one_rank else (None, None)
    config = _config(lora, modules, architecture, base_model or base.name, rank, alpha)
    config["target_modules"] = _targets(list(modules.values()), architecture, base.n_layer)
    arrays: dict[str, NDArray[np.floating]] = {}
    for tensor, module in modules.items():
        n_heads = n_permuted_heads(tensor, architecture, base.n_head, base.n_head_kv)
        pair = lora.pair(tensor)
        if rank is not None and alpha is not None:
            pair = _padded(pair, rank, alpha / rank)
        arrays.update(_named_factors(pair, module, n_heads))
    encoded = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    with publish(folder / "adapter_model.safetensors", force=force) as temporary:
        save_safetensors(temporary, arrays, {"format": "pt"})
    # A config that a killed export left without its weights, or beside older ones, is replaced.
    write_atomic(folder / "adapter_config.json", encoded)


def _architecture(lora: LoraFile) -> Architecture:
    architecture = ARCHITECTURES.get(lora.architecture)
    if architecture is None:
        raise UnsupportedFile(
            f"{lora.path}: the architecture {lora.architecture!r} cannot be exported",
            hint=f"Supported: {', '.join(ARCHITECTURES)}.",
        )
    return architecture


def _modules(lora: LoraFile, architecture: Architecture) -> dict[str, str]:
    """GGUF tensor -> Hugging Face module."""
    modules = {tensor: module_of(tensor, architecture) for tensor in lora.names}
    unknown = [tensor for tensor, module in modules.items() if module is None]
    if unknown:
        raise UnsupportedFile(
            f"{lora.path}: PEFT has no module for these tensors", problems=unknown
        )
    return {tensor: module for tensor, module in modules.items() if module is not None}


def _named_factors(
    pair: LoraPair, module: str, n_heads: int | None
) -> dict[str, NDArray[np.floating]]:
    prefix = f"base_model.model.{module}"
    if pair.name == EMBEDDING:
        return {
            f"{prefix}.lora_embedding_A": pair.lora_b.T,
            f"{prefix}.lora_embedding_B": pair.lora_a.T,
        }
    lora_b = separate_rows(pair.lora_b, n_heads) if n_heads else pair.lora_b
    return {f"{prefix}.lora_A.weight": pair.lora_a, f"{prefix}.lora_B.weight": lora_b}


def _one_rank(lora: LoraFile) -> tuple[int, float]:
    """The rank and the alpha that stand for every pair: alpha = r where scales differ."""
    rank = max(map(lora.rank, lora.names))
    scales = {lora.alpha / lora.rank(name) if lora.alpha else 1.0 for name in lora.names}
    return rank, rank * (scales.pop() if len(scales) == 1 else 1.0)


def _padded(pair: LoraPair, rank: int, scale: float) -> LoraPair:
    """The same update with zeros up to `rank`, and with `scale` as its scale."""
    missing = rank - pair.rank
    lora_b = pair.lora_b
    if not math.isclose(pair.scale, scale, rel_tol=1e-9):
        lora_b = lora_b.astype(np.float32) * np.float32(pair.scale / scale)
    return LoraPair(
        pair.name,
        np.pad(pair.lora_a, ((0, missing), (0, 0))),
        np.pad(lora_b, ((0, 0), (0, missing))),
        scale,
    )


def _config(
    lora: LoraFile,
    modules: Mapping[str, str],
    architecture: Architecture,
    base_model: str,
    one_rank: int | None,
    one_alpha: float | None,
) -> dict[str, Any]:
    ranks = {module: one_rank or lora.rank(tensor) for tensor, module in modules.items()}
    # Alpha 0 in a GGUF means scale 1, that is alpha = r.
    alphas = {
        module: (lora.alpha or float(rank)) if one_alpha is None else one_alpha
        for module, rank in ranks.items()
    }
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: _whole(a) for module, a in alphas.items() if a != alpha},
        "fan_in_fan_out": architecture.conv1d,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
    }


def _targets(modules: list[str], architecture: Architecture, n_layer: int) -> list[str]:
    """Short names where every block has the module, else the full names."""
    layers = f"{architecture.trunk}{architecture.layers}."
    inside = [module.removeprefix(layers) for module in modules if module.startswith(layers)]
    blocks = {str(block) for block in range(n_layer)}
    parts = sorted({module.partition(".")[2] for module in inside})
    if set(inside) != {f"{block}.{part}" for block in blocks for part in parts}:
        return modules
    return parts + [module for module in modules if not module.startswith(layers)]


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
