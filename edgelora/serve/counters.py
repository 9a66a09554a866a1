"""What the engine thread has done so far, for /metrics and for messages."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Sums since the start; written by the engine thread only.

    Attributes:
        prompt_tokens: computed prompt tokens; those taken from the cache are not in it.
        prompt_s, generated_s: seconds of the finished requests' prompts and answers, summed.
        decode_s, sample_s, copy_s: in llama_decode, in llama.cpp's samplers, and with finished
            sequences that are put aside or copied back.
        host_s: the rest of the steps' time, which is Python's: batches, texts, events.
        requests: ended requests by reason: "stop", "length", "failed", "cancelled".
        answer_s: a moving average of a request's time in its slot.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    prompt_s: float = 0.0
    generated_s: float = 0.0
    decode_calls: int = 0
    decode_s: float = 0.0
    sample_s: float = 0.0
    copy_s: float = 0.0
    host_s: float = 0.0
    rejected: int = 0
    requests: collections.Counter[str] = field(default_factory=collections.Counter)
    answer_s: float = 1.0

    @property
    def native_s(self) -> float:
        """Seconds in llama.cpp."""
        return self.decode_s + self.sample_s + self.copy_s


@dataclass(frozen=True)
class Stats:
    """Counters since the start, and what is in use now.

    Attributes:
        cells_used: KV cells that hold tokens, of running and of finished requests.
        cached_sequences: finished requests whose cells are in the KV cache.
        stored_sequences, stored_bytes: finished requests whose cells were put aside, in memory.
        prompt_tokens_total: computed prompt tokens; those taken from the cache are not in it.
        prompt_s, generated_s: seconds of the finished requests' prompts and answers, summed.
        decode_calls, decode_s_total: of llama_decode.
        sample_s_total: in llama.cpp's samplers.
        copy_s_total: with finished sequences that are put aside or copied back.
        host_s_total: the rest of the steps' time, which is Python's.
        requests: ended requests by reason: "stop", "length", "failed", "cancelled".
    """

    queued: int
    running: int
    n_slots: int
    cells_used: int
    cells_total: int
    cached_sequences: int
    stored_sequences: int
    stored_bytes: int
    prompt_tokens_total: int
    generated_tokens_total: int
    cached_tokens_total: int
    prompt_s: float
    generated_s: float
    decode_calls: int
    decode_s_total: float
    sample_s_total: float
    copy_s_total: float
    host_s_total: float
    rejected_total: int
    cancelled_total: int
    requests: dict[str, int]
