"""An adapter as another tool saved it, checked against a base and turned into LoraPairs.

The format modules (peft.py, mlx.py) say which tensors pair up and how they are scaled; here every
problem is found, then raised once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.architectures import (
    ARCHITECTURES,
    EMBEDDING,
    OUTPUT,
    Architecture,
    interleave_rows,
    n_permuted_heads,
    tensor_of,
)
from edgelora.adapters.base import Base
from edgelora.adapters.gguf_lora import PairPlan, is_finite
from edgelora.adapters.lora import LoraPair, find_mismatches
from edgelora.adapters.safetensors_file import ITEM_SIZES, SafetensorsFile
from edgelora.errors import IncompatibleAdapter, InvalidFile, UnsupportedFile

Array = NDArray[np.floating]

MAX_PROBLEMS = 100

# (first, second) as stored -> lora_a (r, in), lora_b (out, r). An embedding's update is
# (vocabulary, embedding) like its weight, whichever way the tool multiplies.
LAYOUTS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "peft": lambda first, second: (first, second),
    "peft embedding": lambda first, second: (second.T, first.T),
    "mlx": lambda first, second: (first.T, second.T),
    "mlx embedding": lambda first, second: (second, first),
}


@dataclass(frozen=True)
class StoredPair:
    """Two tensors of the source file that make one update.

    Attributes:
        module: the Hugging Face module, e.g. `model.layers.0.self_attn.q_proj`.
        first, second: their names in the file.
        layout: a key of LAYOUTS.
        alpha: None where the scale is not alpha / rank (rsLoRA).
        scale: what multiplies lora_b @ lora_a.
    """

    module: str
    first: str
    second: str
    layout: str
    alpha: float | None
    scale: float


@dataclass
class Findings:
    """Problems by what they mean for the person who reads them, and warnings."""

    damaged: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def raise_problems(self, folder: Path, base: Base) -> None:
        """Raise one error that lists every problem, if there is any."""
        problems = [*self.unsupported, *self.damaged, *self.misfits]
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS} more"]
        if self.unsupported:
            raise UnsupportedFile(f"{folder}: cannot be converted", problems=problems)
        if self.damaged:
            raise InvalidFile(
                f"{folder}: damaged", problems=problems, hint="Download or save it again."
            )
        if self.misfits:
            raise IncompatibleAdapter(
                f"{folder}: does not fit the base {base.path}",
                problems=problems,
                hint="Give the base that it was trained for (see its adapter_config.json).",
            )


@dataclass(frozen=True)
class SourceAdapter:
    """An adapter in another tool's format that fits its base.

    Attributes:
        plan: the pairs' names and sizes, in the order of pairs().
        uniform_alpha: the one alpha that explains every scale as alpha / rank, else None (rsLoRA,
            alpha_pattern, alpha 0): then the scales must be baked into lora_b.
        source_sha256: of the weights file followed by adapter_config.json.
        tool: "PEFT" or "MLX".
        base_model: what the adapter's config calls its base.
        warnings: what a person should know of the conversion.
    """

    folder: Path
    plan: tuple[PairPlan, ...]
    uniform_alpha: float | None
    source_sha256: str
    tool: str
    base_model: str
    warnings: tuple[str, ...]
    _weights: SafetensorsFile
    _stored: tuple[StoredPair, ...]
    _base: Base

    def pairs(self) -> Iterator[LoraPair]:
        """Every update as GGUF wants it (rows of Q and K interleaved), one alive at a time."""
        for stored, planned in zip(self._stored, self.plan, strict=True):
            pair = _load(stored, planned.name, self._weights)
            n_heads = _n_heads(planned.name, self._base)
            lora_b = interleave_rows(pair.lora_b, n_heads) if n_heads else pair.lora_b
            yield LoraPair(pair.name, pair.lora_a, lora_b, pair.scale)


def resolve(
    pairs: list[StoredPair], weights: SafetensorsFile, base: Base, findings: Findings
) -> tuple[list[PairPlan], list[StoredPair]]:
    """Find each pair's tensor in the base, and every reason why it cannot be converted."""
    architecture = ARCHITECTURES.get(base.architecture)
    if architecture is None:
        findings.unsupported.append(
            f"the base's architecture {base.architecture!r} is not supported "
            f"({', '.join(ARCHITECTURES)} are)"
        )
        return [], []
    found: dict[str, StoredPair] = {}
    for stored in pairs:
        name = _tensor_name(stored, architecture, base, findings)
        if name in found:
            findings.damaged.append(f"{name}: updated by {found[name].module}, {stored.module}")
        elif name is not None:
            found[name] = stored
    plan = []
    changes = False
    for name in sorted(found, key=_position):
        planned, changing = _check(found[name], name, weights, base, findings)
        plan += planned
        changes = changes or changing
    if plan and not changes:
        findings.warnings.append("this adapter changes nothing: each of its updates is zero")
    return plan, [found[planned.name] for planned in plan]


def uniform_alpha(pairs: list[StoredPair]) -> float | None:
    """The alpha of the file, if one explains every scale; 0 is none (llama.cpp reads scale 1)."""
    alphas = {pair.alpha for pair in pairs}
    alpha = alphas.pop() if len(alphas) == 1 else None
    return alpha if alpha is not None and np.float32(alpha) != 0 else None


def _tensor_name(
    stored: StoredPair, architecture: Architecture, base: Base, findings: Findings
) -> str | None:
    name = tensor_of(stored.module, architecture)
    if name is None:
        findings.unsupported.append(f"{stored.module}: unknown module of {base.architecture}")
    elif name in (EMBEDDING, OUTPUT) and not base.has_output:
        findings.unsupported.append(
            f"{stored.module}: this base ties its embedding and its output (it has no "
            f"{OUTPUT}), where llama.cpp cannot apply a LoRA"
        )
    elif (name == EMBEDDING) != stored.layout.endswith("embedding"):
        findings.damaged.append(f"{stored.module}: {stored.first} is of the wrong kind")
    else:
        return name
    return None


def _check(
    stored: StoredPair, name: str, weights: SafetensorsFile, base: Base, findings: Findings
) -> tuple[list[PairPlan], bool]:
    """The pair's plan (none if it has a problem), and whether its update is not zero."""
    types = {key: weights.tensors[key].dtype for key in (stored.first, stored.second)}
    bad_types = [f"{key}: {dtype}" for key, dtype in types.items() if dtype not in ITEM_SIZES]
    if bad_types:
        findings.unsupported += [f"{text} is none of {', '.join(ITEM_SIZES)}" for text in bad_types]
        return [], False
    if any(len(weights.tensors[key].shape) != 2 for key in types):
        findings.damaged.append(f"{stored.module}: its factors are not matrices")
        return [], False
    pair = _load(stored, name, weights)
    mismatches = [f"{stored.module} -> {text}" for text in find_mismatches(pair, base.shapes)]
    n_heads = _n_heads(name, base)
    if not mismatches and n_heads and pair.lora_b.shape[0] % (2 * n_heads):
        mismatches.append(f"{name}: {pair.lora_b.shape[0]} rows cannot be {n_heads} heads")
    findings.misfits += mismatches
    if pair.rank == 0:
        findings.damaged.append(f"{stored.module}: its rank is 0")
    damaged = [
        f"{key}: holds NaN or infinite values"
        for key, array in ((stored.first, pair.lora_a), (stored.second, pair.lora_b))
        if not is_finite(array)
    ]
    findings.damaged += damaged
    if mismatches:
        return [], False
    if damaged:
        return [], True
    changes = stored.scale != 0 and bool(pair.lora_b.any()) and bool(pair.lora_a.any())
    return [PairPlan(name, pair.rank, pair.lora_a.shape[1], pair.lora_b.shape[0])], changes


def _load(stored: StoredPair, name: str, weights: SafetensorsFile) -> LoraPair:
    first, second = weights.array(stored.first), weights.array(stored.second)
    return LoraPair(name, *LAYOUTS[stored.layout](first, second), stored.scale)


def _n_heads(name: str, base: Base) -> int | None:
    return n_permuted_heads(name, ARCHITECTURES[base.architecture], base.n_head, base.n_head_kv)


def _position(name: str) -> tuple[int, str]:
    block = re.match(r"blk\.(\d+)\.", name)
    outside = {EMBEDDING: -1, OUTPUT: 1 << 30}
    return (int(block[1]) if block else outside[name], name)
