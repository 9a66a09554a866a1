"""One step after the other: which tokens go into a batch, and what becomes of its logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.context import Context
from edgelora.errors import Aborted, ContextFull, EdgeLoRAError, EngineError
from edgelora.serve.batching import ALONE_S, MIXED_S, RowSpeed, Turns, prompt_tokens, share
from edgelora.serve.cells import Cells
from edgelora.serve.counters import Counters
from edgelora.serve.jobs import AdapterSet, Draining
from edgelora.serve.prefixes import common_prefix
from edgelora.serve.requests import Request

_WORTH_WAITING = 32  # tokens of a prefix that another request is about to have computed


@dataclass(frozen=True)
class _Share:
    """A request's part of a batch: `n` tokens from batch index `at`, outputs from row `row`."""

    request: Request
    at: int
    n: int
    row: int
    n_outputs: int


class Stepper:
    """The running requests and the context that computes them; for the engine thread only.

    Attributes:
        running: requests in slots, oldest first.
    """

    def __init__(
        self,
        context: Context,
        cells: Cells,
        counters: Counters,
        adapter_key: Callable[[AdapterSet], Hashable],
    ) -> None:
        self.running: list[Request] = []
        self.speed = RowSpeed()
        self.cells = cells
        self._context = context
        self._counters = counters
        self._adapter_key = adapter_key
        self._turns = Turns()
        self._applied: Hashable = None

    @property
    def is_watched(self) -> bool:
        """Whether somebody waits for the next token of an answer, not only for the whole."""
        return any(request.is_decoding and request.is_streamed for request in self.running)

    def admit(self, request: Request) -> None:
        """Give a request a slot."""
        request.started_s = time.monotonic()
        self.running.append(request)

    def release_cancelled(self) -> None:
        """Free the slots of requests that nobody waits for."""
        for request in [r for r in self.running if r.cancelled]:
            request.abandon()
            self._leave(request)

    def step(self, publish: Callable[[Sequence[Request]], bool]) -> None:
        """Compute one batch of one adapter set.

        Args:
            publish: told whose tokens the batch has before and () after it is computed; False
                means that none of them is wanted any more.
        """
        started_s = time.perf_counter()
        spent_s = self._counters.native_s
        key = self._turns.choose(request.key for request in self.running)
        group = [request for request in self.running if request.key == key]
        try:
            self._apply(key, group)
        except EdgeLoRAError as error:
            self._fail(group, error)
            return
        shares = self._fill(group)
        wanted = publish([share.request for share in shares])
        try:
            logits = self._compute(shares) if wanted else None
        finally:
            publish(())
        if logits is not None:
            self._take(shares, logits)
        spent_s = self._counters.native_s - spent_s
        self._counters.host_s += time.perf_counter() - started_s - spent_s

    def forget(self, is_unwanted: Callable[[Hashable], bool]) -> None:
        """Drop the finished sequences of some adapter sets, and let none of these be applied."""
        self.cells.forget(is_unwanted)
        if is_unwanted(self._applied):
            self._context.apply((), keep=True)
            self._applied = ()

    def _apply(self, key: Hashable, group: Sequence[Request]) -> None:
        if key == self._applied:
            return
        adapters = group[0].job.adapters
        self._applied = None
        self._context.apply(adapters, keep=True)
        if self._adapter_key(adapters) != key:
            raise EngineError("an adapter's file has changed since the request came")
        self._applied = key

    def _fill(self, group: Sequence[Request]) -> list[_Share]:
        batch, shares = self._context.batch, []
        batch.clear()
        for request in group:
            if request.next_token is not None and request.sequence is not None:
                shares.append(_Share(request, batch.n_tokens, 1, batch.n_outputs, 1))
                batch.add(request.next_token, request.n_done, request.sequence, True)
        reading = [r for r in group if not r.is_decoding and self._has_begun(r, group)]
        n_rows = self.speed.n_rows_in(MIXED_S if self.is_watched else ALONE_S)
        budget = prompt_tokens(n_rows, batch.n_tokens)
        budget = min(budget, self._context.n_batch - batch.n_tokens)
        for request, n in zip(reading, share([r.n_left for r in reading], budget), strict=True):
            self._read(request, n, shares)
        return shares

    def _read(self, request: Request, n: int, shares: list[_Share]) -> None:
        """Put `n` prompt tokens into the batch, or fewer where they are outputs."""
        batch, job, start = self._context.batch, request.job, request.n_done
        if job.prompt_logprobs is not None:
            n = min(n, self._context.n_outputs - batch.n_outputs)
        if n <= 0 or request.sequence is None:
            return
        shared = _Share(request, batch.n_tokens, n, batch.n_outputs, 0)
        is_whole = start + n == len(request.prompt)
        if is_whole and batch.n_outputs == self._context.n_outputs:
            n, is_whole = n - 1, False
        scored = job.prompt_logprobs is not None
        batch.extend(request.prompt[start : start + n - is_whole], start, request.sequence, scored)
        if is_whole:
            last = int(request.prompt[-1])
            batch.add(last, start + n - 1, request.sequence, job.max_tokens > 0)
        n_outputs = batch.n_outputs - shared.row
        shares.append(_Share(request, shared.at, n, shared.row, n_outputs))

    def _has_begun(self, request: Request, group: Sequence[Request]) -> bool:
        """Give the request a sequence, unless what it could share is being computed just now."""
        if request.sequence is not None:
            return True
        reuse = request.job.prompt_logprobs is None
        if reuse and self._waits(request, group):
            return False
        request.sequence, n_kept = self.cells.begin(request.key, request.prompt, reuse=reuse)
        request.n_done = request.n_cached = n_kept
        self._counters.cached_tokens += n_kept
        return True

    def _waits(self, request: Request, group: Sequence[Request]) -> bool:
        if request.leader is None:
            request.leader = self._find_leader(request, group)
        leader, n_common = request.leader
        return leader in group and leader.reason is None and leader.n_done < n_common

    def _find_leader(self, request: Request, group: Sequence[Request]) -> tuple[Request, int]:
        """The earlier request that will have computed most of this prompt (or itself)."""
        best = request, 0
        n_there = self.cells.n_known(request.key, request.prompt)
        for other in group[: group.index(request)]:
            n = min(common_prefix(other.prompt, request.prompt), len(request.prompt) - 1)
            if n > max(best[1], n_there + _WORTH_WAITING):
                best = other, n
        return best

    def _compute(self, shares: Sequence[_Share]) -> NDArray[np.float32] | None:
        """The batch's logits; None if it was stopped."""
        self.cells.make_room(self._context.batch.n_tokens)
        started_s = time.perf_counter()
        while True:
            try:
                logits = self._context.compute()
            except Aborted:
                self._drop([share.request for share in shares])
                return None
            except ContextFull as error:
                if not self.cells.evict():
                    self._fail([shares[-1].request], error)
                    return None
            else:
                break
        elapsed_s = time.perf_counter() - started_s
        n_decoding = sum(share.request.is_decoding for share in shares)
        n_prompt = self._context.batch.n_tokens - n_decoding
        self.speed.learn(self._context.batch.n_tokens, elapsed_s)
        self._counters.decode_calls += 1
        self._counters.decode_s += elapsed_s
        self._counters.prompt_tokens += n_prompt
        return logits

    def _take(self, shares: Sequence[_Share], logits: NDArray[np.float32]) -> None:
        for part in shares:
            request = part.request
            rows = logits[part.row : part.row + part.n_outputs]
            self._note(part)
            try:
                self._advance(part, rows)
            except EdgeLoRAError as error:
                self._fail([request], error)
            if request.reason is not None and request in self.running:
                self._ended(request)

    def _note(self, part: _Share) -> None:
        """The tokens of this part are in the KV cache."""
        request = part.request
        assert request.sequence is not None
        if request.next_token is not None:
            self.cells.prefixes.append(request.sequence, request.next_token)
        else:
            tokens = request.prompt[request.n_done : request.n_done + part.n]
            self.cells.prefixes.extend(request.sequence, tokens)

    def _advance(self, part: _Share, rows: NDArray[np.float32]) -> None:
        request, job = part.request, part.request.job
        was_reading = not request.is_decoding
        if was_reading and job.prompt_logprobs is not None:
            n_scored = min(part.n, len(request.prompt) - 1 - request.n_done)
            if n_scored:
                request.score_prompt(rows[:n_scored], request.n_done)
        request.n_done += part.n
        if was_reading:
            if request.n_left:
                return
            request.prefilled()
            if request.reason is not None:
                return
        started_s = time.perf_counter()
        token = request.sampler.sample(self._context, part.at + part.n - 1, rows[-1])
        self._counters.sample_s += time.perf_counter() - started_s
        self._counters.generated_tokens += token >= 0
        request.accept(token, rows[-1], self._context.model.vocabulary)

    def _ended(self, request: Request) -> None:
        """A request was answered: its slot is free, its cells stay for the next ones."""
        counters, now_s = self._counters, time.monotonic()
        counters.prompt_s += request.prefilled_s - request.started_s
        counters.generated_s += now_s - request.prefilled_s
        counters.answer_s += 0.2 * (now_s - request.started_s - counters.answer_s)
        self._leave(request)
        request.close()

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self._counters.requests[request.reason or ""] += 1
        if request.sequence is not None:
            self.cells.finish(request.sequence)

    def _fail(self, requests: Sequence[Request], error: EdgeLoRAError) -> None:
        for request in requests:
            request.reason = "failed"
        self._drop(requests)
        for request in requests:
            request.fail(error)

    def _drop(self, requests: Sequence[Request]) -> None:
        """Free slots, and forget the cells, which may be incomplete."""
        for request in requests:
            if request.reason is None and request.cancelled:
                request.abandon()
            elif request.reason is None:  # `Scheduler.stop` aborts what somebody still waits for
                request.fail(Draining("the server is ending"))
            self.running.remove(request)
            self._counters.requests[request.reason or ""] += 1
            if request.sequence is not None:
                self.cells.drop(request.sequence)
