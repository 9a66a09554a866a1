"""What the header of a GGUF LoRA must say: names, ranks, alpha, types.

The layout is llama.cpp's (src/llama-adapter.cpp), which asserts on keys of the wrong type. For
token_embd.weight it wants the factors flipped: `.lora_a` (vocabulary, r), `.lora_b` (embedding, r).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGMLQuantizationType, GGUFValueType

from edgelora.errors import InvalidFile, UnsupportedFile
from edgelora.gguf_file import GGUFFile, TensorInfo

Scalar = str | int | float | bool

EMBEDDING = "token_embd.weight"
ALPHA_KEY = "adapter.lora.alpha"
DTYPES = {
    "f16": GGMLQuantizationType.F16,
    "f32": GGMLQuantizationType.F32,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
Q8_0_BLOCK = 32


@dataclass(frozen=True)
class PairPlan:
    """What the header must know of a pair before its values exist."""

    name: str
    rank: int
    n_in: int
    n_out: int


@dataclass(frozen=True)
class AdapterRecord:
    """What a file says of itself.

    Attributes:
        alpha: 0 means that every scale is baked into lora_b.
        metadata: every scalar and string of the file, `edgelora.*` among them.
    """

    architecture: str
    alpha: float
    metadata: dict[str, Scalar]


def file_shapes(planned: PairPlan) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of .lora_a and .lora_b as the file has them."""
    if planned.name == EMBEDDING:
        return (planned.n_out, planned.rank), (planned.n_in, planned.rank)
    return (planned.rank, planned.n_in), (planned.n_out, planned.rank)


def read_record(gguf: GGUFFile) -> AdapterRecord:
    """The metadata that llama.cpp reads, whose types it asserts on.

    Raises:
        InvalidFile: keys are missing, of the wrong type or not a LoRA's.
        UnsupportedFile: an activated LoRA.
    """
    wanted = {
        "general.type": GGUFValueType.STRING,
        "adapter.type": GGUFValueType.STRING,
        "general.architecture": GGUFValueType.STRING,
        ALPHA_KEY: GGUFValueType.FLOAT32,
    }
    problems = []
    for key, kind in wanted.items():
        if key not in gguf.metadata:
            problems.append(f"{key} is missing")
        elif gguf.metadata.value_type(key) is not kind:
            problems.append(f"{key} is not of type {kind.name}")
    scalars = gguf.metadata.scalars()
    for key, text in (("general.type", "adapter"), ("adapter.type", "lora")):
        if key in scalars and scalars[key] != text:
            problems.append(f"{key} is {scalars[key]!r}, not {text!r}")
    alpha = scalars.get(ALPHA_KEY)
    if isinstance(alpha, float) and not math.isfinite(alpha):
        problems.append(f"{ALPHA_KEY} is {alpha}")
    if problems:
        raise InvalidFile(f"{gguf.path}: not a GGUF LoRA", problems=problems)
    if "adapter.alora.invocation_tokens" in gguf.metadata:
        raise UnsupportedFile(f"{gguf.path}: an activated LoRA (aLoRA), which is not supported")
    return AdapterRecord(scalars["general.architecture"], scalars[ALPHA_KEY], scalars)


def read_plan(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, PairPlan], list[str]]:
    """The pairs in file order, and every problem with them."""
    problems = []
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in tensors.items():
        base, _, suffix = name.rpartition(".")
        if suffix not in ("lora_a", "lora_b") or ".lora_" in base:
            problems.append(f"{name}: neither .lora_a nor .lora_b")
        elif len(info.shape) != 2:
            problems.append(f"{name}: has shape {info.shape}, not a matrix")
        else:
            found.setdefault(base, {})[suffix] = info.shape
    plan = {}
    for name, shapes in found.items():
        if len(shapes) != 2:
            problems.append(f"{name}: has only {next(iter(shapes))}")
        else:
            plan[name] = _plan_pair(name, shapes["lora_a"], shapes["lora_b"])
            if file_shapes(plan[name])[1] != shapes["lora_b"]:
                problems.append(f"{name}: {shapes['lora_a']} and {shapes['lora_b']} do not pair")
    if not plan and not problems:
        problems.append("there is no tensor in it")
    return plan, problems


@functools.lru_cache(maxsize=4096)  # one object for all adapters of one layout
def _plan_pair(name: str, lora_a: tuple[int, ...], lora_b: tuple[int, ...]) -> PairPlan:
    if name == EMBEDDING:
        return PairPlan(name, lora_a[1], lora_b[0], lora_a[0])
    return PairPlan(name, lora_a[0], lora_a[1], lora_b[0])


def refuse_types(gguf: GGUFFile) -> None:
    """Raise UnsupportedFile where a factor has a type other than DTYPES."""
    bad = [
        f"{name}: {info.ggml_type.name}"
        for name, info in gguf.tensors.items()
        if info.ggml_type not in DTYPES.values()
    ]
    if bad:
        raise UnsupportedFile(
            f"{gguf.path}: factors must be F32, F16, BF16 or Q8_0", problems=bad[:20]
        )
