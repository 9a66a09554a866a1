"""PEFT folders (and mlx-lm's) -> LoraPairs -> a GGUF LoRA. Torch is not needed.

Not covered: pickles (adapter_model.bin), which are code, and sharded adapters. Writing a PEFT
folder is in peft_export.py.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgelora import __version__
from edgelora.adapters import mlx
from edgelora.adapters.architectures import EMBEDDING
from edgelora.adapters.base import Base
from edgelora.adapters.gguf_lora import AdapterRecord, Scalar, write_lora
from edgelora.adapters.peft_config import PeftConfig, parse_config, read_json
from edgelora.adapters.peft_export import write_peft
from edgelora.adapters.safetensors_file import SafetensorsFile, open_safetensors
from edgelora.adapters.source import (
    Findings,
    SourceAdapter,
    StoredPair,
    resolve,
    uniform_alpha,
)
from edgelora.errors import InvalidFile, NotFound

__all__ = ["convert", "convert_source", "read_adapter", "write_peft"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FORMAT_VERSION = 1
MAX_NOTES = 3
MAX_MODULE = 200  # characters; a pattern of the config is matched against each name

# `.default` is the adapter's name, which PEFT removes when it saves and others do not.
_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?P<adapter>\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?P<adapter>\.[^.]+)?")
_FOREIGN = {
    r"lora_magnitude_vector": "a DoRA magnitude",
    r"lora_[AB](\.[^.]+)?\.bias$": "a bias of the LoRA (lora_bias)",
    r"modules_to_save|original_module": "a module saved whole (modules_to_save)",
    r"(^|\.)(score|classifier|classification_head|v_head)\.": "a classification head (SEQ_CLS)",
    r"(embed_tokens|wte|lm_head)\.weight$": "an embedding or output matrix saved whole",
    r"(norm|ln_\w+)\.(weight|bias)$": "a trained norm",
    r"\.bias$": "a trained bias",
}


def read_adapter(folder: Path, base: Base) -> SourceAdapter:
    """Read and check a PEFT or mlx-lm adapter folder for this base.

    Raises:
        NotFound: no such folder, or one without an adapter in it.
        UnsupportedFile, InvalidFile, IncompatibleAdapter: something in it is refused, damaged, or
            does not fit the base; whichever is raised lists all problems of all three kinds.
    """
    config_path = folder / CONFIG
    if not folder.is_dir():
        raise NotFound(f"{folder}: no such folder", hint=f"Give the folder that holds {CONFIG}.")
    if not config_path.is_file():
        raise NotFound(f"{folder}: has no {CONFIG}, so it is not an adapter's folder")
    raw = read_json(config_path)
    findings = Findings()
    weights_path = _find_weights(folder, mlx.WEIGHTS if mlx.is_mlx(raw) else WEIGHTS)
    pairs, weights = _read_pairs(raw, weights_path, base, findings)
    plan, stored = resolve(pairs, weights, base, findings) if weights else ([], [])
    if weights and not pairs and not findings.unsupported + findings.damaged:
        findings.damaged.append(f"{weights_path.name}: holds no LoRA that its config targets")
    findings.raise_problems(folder, base)
    if weights is None:
        raise InvalidFile(f"{weights_path}: cannot be read")
    return SourceAdapter(
        folder=folder,
        plan=tuple(plan),
        uniform_alpha=uniform_alpha(stored),
        source_sha256=_hash_files(weights_path, config_path),
        tool="MLX" if mlx.is_mlx(raw) else "PEFT",
        base_model=str(raw.get("base_model_name_or_path") or raw.get("model") or ""),
        warnings=tuple(findings.warnings),
        _weights=weights,
        _stored=tuple(stored),
        _base=base,
    )


def convert(
    folder: Path,
    base: Base,
    out_path: Path,
    *,
    dtype: str = "f16",
    metadata: Mapping[str, Scalar] | None = None,
    warn: Callable[[str], None] | None = None,
) -> AdapterRecord:
    """Convert a PEFT or mlx-lm adapter folder to a GGUF LoRA for this base.

    Args:
        out_path: written directly; a temporary path (see files.publish).
        dtype: f16, f32, bf16 or q8_0 (ranks and widths that are multiples of 32).
        metadata: `edgelora.*` keys to add to those that convert_source writes.
        warn: gets each warning; by default they are Python warnings.

    Raises:
        EdgeLoRAError: see read_adapter and gguf_lora.write_lora.
    """
    source = read_adapter(folder, base)
    for message in source.warnings:
        if warn:
            warn(f"{folder}: {message}")
        else:
            warnings.warn(f"{folder}: {message}", stacklevel=2)
    return convert_source(source, base, out_path, dtype=dtype, metadata=metadata)


def convert_source(
    source: SourceAdapter,
    base: Base,
    out_path: Path,
    *,
    dtype: str = "f16",
    metadata: Mapping[str, Scalar] | None = None,
) -> AdapterRecord:
    """Write an adapter that read_adapter has checked (its warnings are the caller's to show).

    One alpha for all and no rsLoRA: the factors stay as they are, bit-equal to what llama.cpp's
    convert_lora_to_gguf.py writes. Else each scale is baked into lora_b.
    """
    identity = base.identity
    own: dict[str, Scalar] = {
        "edgelora.format_version": FORMAT_VERSION,
        "edgelora.created_by": f"edgelora {__version__}",
        "edgelora.source_sha256": source.source_sha256,
        "edgelora.base.id": identity.id,
        "edgelora.base.architecture": identity.architecture,
        "edgelora.base.shapes": identity.shapes,
        "edgelora.base.tokenizer": identity.tokenizer,
        "edgelora.base.norms": identity.norms,
    }
    return write_lora(
        out_path,
        source.plan,
        source.pairs(),
        architecture=base.architecture,
        alpha=source.uniform_alpha,
        dtype=dtype,
        metadata={**own, **(metadata or {})},
    )


def _find_weights(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    for other in ("adapter_model.bin", "adapters.npz"):
        if (folder / other).is_file():
            raise InvalidFile(
                f"{folder / other}: only safetensors are read, since a pickle can run code",
                hint=f"Save the adapter again as {name} (PEFT: safe_serialization=True).",
            )
    raise NotFound(f"{folder}: has no {name}", hint="Download the adapter's weights too.")


def _read_pairs(
    raw: Mapping[str, Any], weights_path: Path, base: Base, findings: Findings
) -> tuple[list[StoredPair], SafetensorsFile | None]:
    """What the config and the weights say together; weights are None where they are damaged."""
    weights = None
    try:
        weights = open_safetensors(weights_path)
    except InvalidFile as error:
        findings.damaged += [f"{error.what}. {error.hint}".rstrip(". "), *error.problems]
    if mlx.is_mlx(raw):
        scale = mlx.read_scale(raw, findings)
        return (mlx.pair_up(weights, scale, findings) if weights else []), weights
    config, refusals, config_warnings = parse_config(raw)
    findings.unsupported += refusals
    findings.warnings += config_warnings
    return (_pair_up(weights, config, base, findings) if weights else []), weights


def _pair_up(
    weights: SafetensorsFile, config: PeftConfig | None, base: Base, findings: Findings
) -> list[StoredPair]:
    modules: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name in weights.tensors:
        match = _LINEAR.fullmatch(name) or _EMBEDDING.fullmatch(name)
        if match is None:
            _judge_foreign(name, weights, base, findings)
            continue
        layout = "peft" if match.re is _LINEAR else "peft embedding"
        module = match["module"].removeprefix("base_model.model.")
        if len(module) > MAX_MODULE:
            findings.unsupported.append(f"{module[:MAX_MODULE]}...: unknown module")
            continue
        sides = modules.setdefault((module, layout), {})
        sides.setdefault(match["side"], []).append(name)
    pairs = []
    skipped = []
    notes: list[str] = []
    for (module, layout), sides in modules.items():
        names = [name for side in "AB" for name in sides.get(side, [])]
        if len(sides) != 2 or len(names) != 2:
            findings.damaged.append(f"{module}: expected one A and one B, found {names}")
        elif config is not None and config.targets(module):
            pairs.append(_stored_pair(module, names, layout, weights, config, notes))
        elif config is not None:
            skipped.append(module)
    findings.warnings += notes[:MAX_NOTES]
    if len(notes) > MAX_NOTES:
        findings.warnings.append(f"and {len(notes) - MAX_NOTES} more warnings of these kinds")
    if skipped:
        findings.warnings.append(
            f"{len(skipped)} modules have weights but are not targeted by {CONFIG}, so PEFT does "
            f"not apply them, and they were left out: {_shorten(skipped)}"
        )
    return pairs


def _stored_pair(
    module: str,
    names: list[str],
    layout: str,
    weights: SafetensorsFile,
    config: PeftConfig,
    notes: list[str],
) -> StoredPair:
    rank = (*weights.tensors[names[0]].shape[:1], 0)[0]
    scale = config.scale_of(module, rank) if rank else 0.0
    if rank != config.rank_of(module):
        notes.append(
            f"{module}: has rank {rank}, {CONFIG} says {config.rank_of(module)}; "
            f"scaled by its own rank ({scale:g})"
        )
    alphas = config.alphas_of(module)
    if len(alphas) > 1:
        notes.append(
            f"{module}: several patterns of alpha_pattern match it ({sorted(alphas)}); used the "
            f"first in the file, {config.alpha_of(module):g}, as PEFT does when it loads this"
        )
    alpha = None if config.use_rslora else config.alpha_of(module)
    return StoredPair(module, names[0], names[1], layout, alpha, scale)


def _judge_foreign(name: str, weights: SafetensorsFile, base: Base, findings: Findings) -> None:
    """A tensor that is no LoRA factor: refused by name, but for copies of the base's own."""
    if ".base_layer." in name:
        shape = weights.tensors[name].shape
        if "embed" in name and shape != base.shapes.get(EMBEDDING):
            findings.unsupported.append(f"{name}: an embedding of another size, {shape}")
        else:
            findings.warnings.append(f"{name}: a copy of the base's own weights, left out")
        return
    kind = next((text for key, text in _FOREIGN.items() if re.search(key, name)), "no LoRA factor")
    findings.unsupported.append(f"{name}: {kind}, which a GGUF LoRA cannot hold")


def _hash_files(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
