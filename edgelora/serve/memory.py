"""How many requests of how many tokens fit the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass

from edgelora.adapters.base import Base
from edgelora.engine.needs import Needs
from edgelora.errors import EdgeLoRAError

_BYTES_OF = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
_WANTED_CTX, _WANTED_SLOTS, _SMALLEST_CTX = 4096, 4, 512
# KV takes at most this share of what is free beside the weights: adapters, batches and whatever
# else runs on the machine need the rest.
_SHARE = 0.5


@dataclass(frozen=True)
class Room:
    """Slots, the tokens of each, the KV cells that they take together, and the cache beside."""

    n_slots: int
    n_ctx: int
    kv_bytes: int
    cache_bytes: int

    def describe(self, kv_type: str) -> str:
        """One line for the person who starts the server."""
        return (
            f"{self.n_slots} slots of {self.n_ctx:,} tokens; "
            f"KV cache {self.kv_bytes / 1e6:,.0f} MB ({kv_type}), "
            f"prefixes {self.cache_bytes / 1e6:,.0f} MB at most"
        )


def token_bytes(base: Base, kv_type: str) -> float:
    """Bytes of the keys and values of one token: 128 KiB for Mistral 7B in f16."""
    return 2 * base.n_layer * base.n_head_kv * base.head_dim * _BYTES_OF[kv_type]


def fit(
    base: Base,
    needs: Needs,
    *,
    n_ctx_train: int,
    available_bytes: int,
    kv_type: str = "f16",
    n_slots: int = 0,
    n_ctx: int = 0,
    cache_bytes: int = 0,
) -> Room:
    """Slots and context for the free memory; what is given (not 0) stays as it is.

    Slots are given up before tokens, down to one slot of 512.

    Args:
        available_bytes: free now, with the base's weights not counted as free.
        cache_bytes: for prefixes beside the KV cache; no more than an eighth of what is free.

    Raises:
        EdgeLoRAError: what was asked for, or the least that is useful, does not fit.
    """
    each = token_bytes(base, kv_type)
    free = available_bytes - needs.logits_bytes
    budget = _SHARE * max(free, 0)
    slots = n_slots or _WANTED_SLOTS
    ctx = min(n_ctx or _WANTED_CTX, n_ctx_train)
    while slots * ctx * each > budget:
        if not n_slots and slots > 1:
            slots -= 1
        elif not n_ctx and ctx > _SMALLEST_CTX:
            ctx = max(_SMALLEST_CTX, ctx // 2)
        else:
            break
    cache = min(cache_bytes, max(free, 0) // 8)
    room = Room(slots, ctx, round(slots * ctx * each), cache)
    if room.kv_bytes > max(free, 0):
        megabytes = max(free, 0) / 1e6
        raise EdgeLoRAError(
            f"{base.path.name}: {room.describe(kv_type)}; {megabytes:,.0f} MB are free for it",
            hint="Try --kv-type q8_0, fewer --slots, a smaller --context, or --low-ram.",
        )
    return room
