"""What a request asks of the engine and what comes back: jobs, events, limits, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edgelora.engine.model import WeightedAdapter
from edgelora.engine.sampling import Sampling
from edgelora.errors import EdgeLoRAError

# As engine.model.resolve_weights gives it, sorted by path; () is the base alone.
AdapterSet = tuple[WeightedAdapter, ...]


@dataclass(frozen=True)
class Limits:
    """What the scheduler may use.

    Attributes:
        n_slots: requests that are computed at the same time.
        n_ctx: tokens that one request may have, prompt and answer together.
        n_batch: tokens of one decode at most.
        kv_type: "f16", "q8_0", "q4_0" or "f32".
        max_queue: requests that may wait for a slot; one more is refused with QueueFull.
        queue_timeout_s: a request that waits longer gets QueueTimeout.
        n_cached_sequences: finished requests that stay in the KV cache for the next ones at most;
            0: nothing is ever reused.
        cache_bytes: memory beside the KV cache for what leaves it, so that a prefix is copied back
            rather than computed again.
    """

    n_slots: int = 4
    n_ctx: int = 4096
    n_batch: int = 512
    kv_type: str = "f16"
    max_queue: int = 64
    queue_timeout_s: float = 60.0
    n_cached_sequences: int = 16
    cache_bytes: int = 256 << 20

    @property
    def n_cells(self) -> int:
        """KV cells in all: every running request may use its whole context."""
        return self.n_slots * self.n_ctx


@dataclass(frozen=True)
class Job:
    """One answer to one prompt.

    Attributes:
        prompt: token ids, at least one.
        adapters: what is applied; () is exactly the base.
        max_tokens: tokens to generate at most, the end token included; 0 only reads the prompt.
        stop: strings that end the answer; they are never part of it.
        n_logprobs: None: none; 0: of each generated token; k: and of the k likeliest.
        prompt_logprobs: the same for the prompt's tokens (the first has none).
        ignore_eos: tokens that end a turn are never drawn.
    """

    prompt: tuple[int, ...]
    adapters: AdapterSet = ()
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    n_logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """One token of a prompt or an answer under the model's raw distribution.

    Attributes:
        text: its UTF-8 bytes, perhaps a part of a character; b"" for control tokens.
        logprob: natural logarithm; None for a prompt's first token.
        top: the likeliest tokens as (id, bytes, logprob), best first.
    """

    token: int
    text: bytes
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds that a request waited, that its prompt took, and that its answer took."""

    queued_s: float
    prompt_s: float
    generated_s: float


@dataclass(frozen=True)
class Prefilled:
    """The prompt is computed; comes once, before any Piece.

    Attributes:
        n_cached: tokens of the prompt that were not computed, as an earlier request had them.
        prompt: () unless `prompt_logprobs` was asked for.
    """

    n_prompt: int
    n_cached: int
    prompt: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that is final: no partial character, no possible beginning of a stop string.

    Attributes:
        tokens: () unless `n_logprobs` was asked for; those whose text is in this or an earlier
            piece and were not given before.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of a request that was answered.

    Attributes:
        reason: "stop" (an end token, the end of the grammar, or a stop string) or "length".
        stop: the stop string that ended it, if one did.
        n_generated: tokens drawn, an end token included.
    """

    reason: str
    stop: str | None
    n_prompt: int
    n_cached: int
    n_generated: int
    timings: Timings


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be answered."""

    error: EdgeLoRAError


Event = Prefilled | Piece | Finished | Failed
Emit = Callable[[Event], None]  # called on the engine thread; it must not block


class QueueFull(EdgeLoRAError):
    """As many requests wait as may.

    Args:
        retry_after_s: when a place is likely to be free.
    """

    def __init__(self, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            "the queue of requests is full", hint=f"Try again in {retry_after_s:.0f} seconds."
        )


class QueueTimeout(EdgeLoRAError):
    """A request that waited for a slot longer than the server allows."""


class Draining(EdgeLoRAError):
    """The server is ending, or has failed: it takes no new requests."""


class ContextOverflow(EdgeLoRAError):
    """A prompt and its answer that do not fit one request's context; nothing is ever cut."""

    def __init__(self, n_prompt: int, max_tokens: int, n_ctx: int) -> None:
        self.n_prompt, self.max_tokens, self.n_ctx = n_prompt, max_tokens, n_ctx
        super().__init__(
            f"a prompt of {n_prompt} tokens and an answer of {max_tokens} do not fit "
            f"a context of {n_ctx}"
        )
