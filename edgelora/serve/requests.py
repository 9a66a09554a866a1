"""One request from its submission to its last event: what it has computed, said and still owes."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.logprobs import Logprobs, logprobs
from edgelora.engine.sampling import Sampler
from edgelora.engine.tokens import Vocabulary
from edgelora.errors import EdgeLoRAError
from edgelora.serve.jobs import (
    Emit,
    Event,
    Failed,
    Finished,
    Job,
    Piece,
    Prefilled,
    Timings,
    TokenLogprob,
)
from edgelora.serve.texts import AnswerText


class Request:
    """A job under way. Only the engine thread touches it, but for `cancelled`.

    Attributes:
        key: what its KV cells depend on besides tokens.
        prompt: (n,) int32.
        sequence: its id in the KV cache; None before its prompt is begun.
        n_done: tokens in the KV cache.
        is_streamed: whether its pieces are sent as they come.
        next_token: drawn, but not computed yet; None while the prompt is read.
        leader: another request whose prompt is being read, and how much of it this one shares.
        reason: how it ended, once it has.
    """

    def __init__(
        self, job: Job, key: Hashable, sampler: Sampler, emit: Emit, streamed: bool, pieces: Pieces
    ) -> None:
        self.job, self.key, self.sampler = job, key, sampler
        self.prompt = np.array(job.prompt, np.int32)
        self.cancelled = False
        self.sequence: int | None = None
        self.leader: tuple[Request, int] | None = None
        self.n_cached = self.n_done = self.n_generated = 0
        self.next_token: int | None = None
        self.reason: str | None = None
        self.submitted_s = time.monotonic()
        self.started_s = self.prefilled_s = 0.0
        self._emit, self.is_streamed, self._pieces = emit, streamed, pieces
        self._text = AnswerText(job.stop)
        self._last: Finished | None = None
        self._gathered: list[str] = []
        self._gathered_tokens: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        if job.prompt_logprobs is not None:
            first = job.prompt[0]
            self._prompt_logprobs.append(TokenLogprob(first, pieces[first], None))

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt is read and a token is waiting to be computed."""
        return self.next_token is not None

    @property
    def n_left(self) -> int:
        """Prompt tokens that are still to be computed."""
        return max(0, len(self.prompt) - self.n_done)

    def score_prompt(self, logits: NDArray[np.float32], start: int) -> None:
        """Take the logits after prompt tokens from `start` on; each predicts the next one."""
        k = self.job.prompt_logprobs or 0
        targets = self.prompt[start + 1 : start + 1 + len(logits)]
        self._prompt_logprobs += self._token_logprobs(
            targets.tolist(), logprobs(logits, targets, k)
        )

    def prefilled(self) -> None:
        """The prompt is computed."""
        self.prefilled_s = time.monotonic()
        self.emit(Prefilled(len(self.prompt), self.n_cached, tuple(self._prompt_logprobs)))
        if self.job.max_tokens == 0:
            self._finish("length")

    def accept(self, token: int, logits: NDArray[np.float32], vocabulary: Vocabulary) -> None:
        """The next token has been drawn from these (n_vocab,) logits; -1: the grammar ended."""
        self.n_generated += token >= 0
        self.next_token = None
        logprob = None
        if token >= 0 and self.job.n_logprobs is not None:
            found = logprobs(logits[None], [token], self.job.n_logprobs)
            (logprob,) = self._token_logprobs([token], found)
        if token < 0 or token in vocabulary.end_tokens:
            # It has no text, but its log-probability is one of the answer's: lm-eval counts on it.
            self._text.feed(b"", logprob)
            self._finish("stop")
            return
        text = self._text.feed(self._pieces[token], logprob)
        if self._text.stop is not None:
            self._give(text)
            self._finish("stop")
        elif self.n_generated >= self.job.max_tokens:
            self._give(text)
            self._finish("length")
        else:
            self.next_token = token
            self._give(text)

    def fail(self, error: EdgeLoRAError) -> None:
        """End with an error."""
        self.reason = "failed"
        self.emit(Failed(error))
        self.sampler.close()

    def abandon(self) -> None:
        """End without a word: nobody listens any more."""
        self.reason = "cancelled"
        self.sampler.close()

    def close(self) -> None:
        """Say that it has finished, when its slot is free already."""
        if self._last is not None:
            self.emit(self._last)
        self.sampler.close()

    def emit(self, event: Event) -> None:
        """Tell the endpoint, if it still listens."""
        if self.cancelled:
            return
        try:
            self._emit(event)
        except RuntimeError:  # its event loop is gone, and with it whoever asked
            self.cancelled = True

    def _give(self, text: str, *, every: bool = False) -> None:
        tokens = self._text.tokens(every=every) if self.job.n_logprobs is not None else ()
        if not text and not tokens:
            return
        if self.is_streamed:
            self.emit(Piece(text, tokens))
        else:
            self._gathered.append(text)
            self._gathered_tokens += tokens

    def _finish(self, reason: str) -> None:
        if self._text.stop is None:
            rest = self._text.feed(b"", last=True)
            self._give(rest, every=self._text.stop is None)
        if self._gathered:
            self.emit(Piece("".join(self._gathered), tuple(self._gathered_tokens)))
        self.reason = "stop" if self._text.stop is not None else reason
        now = time.monotonic()
        timings = Timings(
            queued_s=self.started_s - self.submitted_s,
            prompt_s=self.prefilled_s - self.started_s,
            generated_s=now - self.prefilled_s,
        )
        self._last = Finished(
            self.reason, self._text.stop, len(self.prompt), self.n_cached, self.n_generated, timings
        )

    def _token_logprobs(self, tokens: Sequence[int], found: Logprobs) -> list[TokenLogprob]:
        pieces = self._pieces
        return [
            TokenLogprob(
                token,
                pieces[token],
                logprob,
                tuple((i, pieces[i], value) for i, value in zip(ids, values, strict=True)),
            )
            for token, logprob, ids, values in zip(
                tokens,
                found.chosen.tolist(),
                found.top_ids.tolist(),
                found.top.tolist(),
                strict=True,
            )
        ]


class Pieces(dict[int, bytes]):
    """The UTF-8 bytes of each token, asked of llama.cpp once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __missing__(self, token: int) -> bytes:
        self[token] = piece = self._vocabulary.decode([token])
        return piece
