"""Adapters of mlx-lm: adapters.safetensors and adapter_config.json with lora_parameters.

mlx-lm (tuner/lora.py) stores lora_a (in, r) and lora_b (r, out) and multiplies by one `scale`. Not
covered: adapters.npz, DoRA, experts (LoRASwitchLinear), adapters that mlx-lm has quantised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgelora.adapters.safetensors_file import SafetensorsFile
from edgelora.adapters.source import Findings, StoredPair

WEIGHTS = "adapters.safetensors"


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether this adapter_config.json is mlx-lm's rather than PEFT's."""
    return "peft_type" not in config and bool({"lora_parameters", "fine_tune_type"} & config.keys())


def read_scale(config: Mapping[str, Any], findings: Findings) -> float:
    """The factor that mlx-lm puts before lora_a @ lora_b."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        findings.unsupported.append(f"its fine_tune_type is {kind!r}, only 'lora' is supported")
    if config.get("use_dora"):
        findings.unsupported.append("uses DoRA (use_dora)")
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) < 1e30:
        findings.damaged.append(
            f"adapter_config.json: lora_parameters.scale is {scale!r}, expected a finite number"
        )
        return 1.0
    if isinstance(parameters, dict) and "alpha" in parameters:
        findings.unsupported.append(
            "adapter_config.json: lora_parameters has alpha and scale, which early and later "
            "mlx-lm multiply differently: write the product into scale and remove alpha"
        )
    return float(scale)


def pair_up(weights: SafetensorsFile, scale: float, findings: Findings) -> list[StoredPair]:
    """The adapter's updates; whatever else the file holds becomes a problem."""
    modules: dict[str, dict[str, str]] = {}
    for name in weights.tensors:
        match = re.fullmatch(r"(.+)\.lora_([ab])", name)
        if match:
            modules.setdefault(match[1], {})[match[2]] = name
        elif name.endswith(".m"):
            findings.unsupported.append(f"{name}: a DoRA magnitude")
        else:
            findings.unsupported.append(f"{name}: neither lora_a nor lora_b")
    pairs = []
    for module, names in modules.items():
        if len(names) != 2:
            findings.damaged.append(f"{module}: has lora_{next(iter(names))} only")
            continue
        is_embedding = module.endswith(("embed_tokens", "wte"))
        layout = "mlx embedding" if is_embedding else "mlx"
        rank = weights.tensors[names["a"]].shape[-1:]
        alpha = scale * rank[0] if rank else 0.0
        pairs.append(StoredPair(module, names["a"], names["b"], layout, alpha, scale))
    return pairs
