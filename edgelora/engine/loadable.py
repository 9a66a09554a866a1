"""Whether llama.cpp survives a base: what it asserts on is looked for in the header first.

Read in llama.cpp 0c1e5709 (src/llama-model.cpp, llama-vocab.cpp, src/models), and found by
scripts/fuzz.py. Not covered: what only other architectures than those of
edgelora.adapters.architectures assert on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from edgelora.adapters.architectures import ARCHITECTURES
from edgelora.adapters.base import Base
from edgelora.errors import InvalidFile, UnsupportedFile
from edgelora.gguf_file import Metadata, open_gguf

MAX_BLOCKS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024
_WHOLLY_ROTATED = ("llama", "qwen2", "qwen3")
_NOT_ROTATED = "gpt2"
_ALIGNMENT = 32  # of ggml's buffers, into which the file is mapped
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_TOKENIZER = "tokenizer.ggml."
_SPM = "llama"
# Kinds of vocabularies that text can be made of, and of tokens; `none` has no tokens at all.
_KINDS = ("llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace")


def refuse_unloadable(base: Base) -> None:
    """Refuse a base whose header would end the process.

    Raises:
        InvalidFile: every problem is listed.
        UnsupportedFile: a vocabulary of a kind that gives no text.
    """
    gguf = open_gguf(base.path)
    metadata, first = gguf.metadata, min(info.offset for info in gguf.tensors.values())
    kind = metadata.get(f"{_TOKENIZER}model")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UnsupportedFile(
            f"{base.path}: its tokenizer is {str(kind)[:40]!r}, none of {', '.join(_KINDS)}"
        )
    problems = [*_number_problems(base, metadata), *_vocabulary_problems(metadata, kind)]
    if first % _ALIGNMENT:
        problems.append(f"its tensors begin at byte {first}, no multiple of {_ALIGNMENT}")
    if problems:
        raise InvalidFile(f"{base.path}: llama.cpp cannot load it", problems=problems[:20])


def _number_problems(base: Base, metadata: Metadata) -> Iterator[str]:
    prefix = f"{base.architecture}."
    own = {key.removeprefix(prefix): key for key in metadata if key.startswith(prefix)}
    scalars = {short: value for short, key in own.items()
               if not isinstance(value := metadata[key], list)}  # fmt: skip
    if base.n_layer > MAX_BLOCKS:
        yield f"{base.n_layer} blocks, more than {MAX_BLOCKS}"
    for key, most in (("nextn_predict_layers", base.n_layer), ("expert_count", MAX_EXPERTS)):
        if not _is_whole(scalars.get(key, 0), most):
            yield f"{prefix}{key} is {scalars[key]!r}, not a number up to {most}"
    scaling = scalars.get("rope.scaling.type", "none")
    if not isinstance(scaling, str) or scaling not in _ROPE_SCALINGS:
        yield f"{prefix}rope.scaling.type is {scaling!r}, none of {', '.join(_ROPE_SCALINGS)}"
    if base.n_head % base.n_head_kv:
        yield f"{base.n_head} heads cannot share {base.n_head_kv} of keys and values"
    for key in ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"):
        epsilon = scalars.get(key, 0.0)
        if not isinstance(epsilon, int | float) or not 0 <= epsilon < math.inf:
            yield f"{prefix}{key} is {epsilon!r}, not a number from 0 on"
    yield from _expert_problems(scalars)
    if base.architecture in ARCHITECTURES:
        yield from _allow_listed_problems(base, scalars)


def _expert_problems(scalars: Mapping[str, Any]) -> Iterator[str]:
    n, used, n_groups, n_used_groups = (
        int(np.max(value)) if np.size(value := scalars.get(key, 0)) else 0
        for key in ("expert_count", "expert_used_count", "expert_group_count",
                    "expert_group_used_count")
    )  # fmt: skip
    if not (0 < used <= n if n else used == 0):
        yield f"{used} of {n} experts are used"
    if n_groups > 1 and not (n_groups < n and n % n_groups == 0 and 0 < n_used_groups < n_groups):
        yield f"{n} experts in {n_groups} groups, of which {n_used_groups} are used"
    elif n_groups == 1 and n < 2:
        yield f"{n} experts in a group"


def _allow_listed_problems(base: Base, scalars: Mapping[str, Any]) -> Iterator[str]:
    """What the architectures that adapters can be made for take for granted."""
    width = base.head_dim
    if scalars.get("attention.value_length", width) != width:
        yield f"heads of {width} numbers for keys, {scalars['attention.value_length']!r} for values"
    n_rotated = scalars.get("rope.dimension_count", width)
    none_allowed = base.architecture == _NOT_ROTATED  # others would loop without end
    if not _is_whole(n_rotated, width) or n_rotated % 2 or not (n_rotated or none_allowed):
        yield f"{n_rotated!r} numbers of a head of {width} are rotated"
    elif n_rotated != width and base.architecture in _WHOLLY_ROTATED:
        yield f"{n_rotated} numbers of a head of {width} are rotated, not all"
    if "attention.head_count" in scalars:  # not one for each block
        yield from _attention_problems(base)


def _attention_problems(base: Base) -> Iterator[str]:
    """Each block has the three matrices of attention, or one of all three, for the heads."""
    rows = {"q": base.n_head, "k": base.n_head_kv, "v": base.n_head_kv}
    rows["qkv"] = sum(rows.values())
    for block in range(min(base.n_layer, MAX_BLOCKS)):
        found = {p: s for p in rows if (s := base.shapes.get(f"blk.{block}.attn_{p}.weight"))}
        if "qkv" not in found:
            for part in sorted({*"qkv"} - found.keys()):
                yield f"blk.{block}.attn_{part}.weight is missing"
        for part, shape in found.items():
            if shape[-2:][0] != rows[part] * base.head_dim:
                yield (
                    f"blk.{block}.attn_{part}.weight has shape {shape}, not {rows[part]} heads of "
                    f"{base.head_dim}"
                )


def _vocabulary_problems(metadata: Metadata, kind: str) -> Iterator[str]:
    try:
        tokens = metadata.raw_strings(f"{_TOKENIZER}tokens")
    except (KeyError, TypeError):
        yield f"{_TOKENIZER}tokens is not a list of texts"
        return
    twice = [token for token, n in Counter(tokens).items() if n > 1 and token]
    if twice:
        yield f"{len(twice)} tokens come twice, such as {twice[0][:40]!r}"
    if kind != _SPM:
        return
    known = set(tokens)
    missing = [b for b in range(256) if not {b"<0x%02X>" % b, bytes([b])} & known]
    if missing:
        yield f"{len(missing)} of the 256 byte tokens are missing, such as <0x{missing[0]:02X}>"


def _is_whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
