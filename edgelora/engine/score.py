"""Log-likelihoods of completions, and greedy answers, under the adapters of a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.engine.context import Context, Row, open_context
from edgelora.engine.model import Model
from edgelora.errors import EngineError
from edgelora.metrics import paired_bootstrap

_MIN_SHARED = 8
# Of a context for scoring: tokens of a sequence; with low_ram cells, at least, and of one decode.
_N_CTX, _LOW_RAM_CELLS, _LOW_RAM_BATCH = 4096, 512, 128


@dataclass(frozen=True)
class TokenisedExample:
    """A prompt and its completion (end token included) as token ids; `line` is for messages."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    line: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Score:
    """What a model made of one example.

    Attributes:
        nll: negative log-likelihood of the completion in nats, summed over its tokens.
        n_tokens: completion tokens, the end token included.
        answer: greedy answer as token ids, empty unless asked for.
    """

    nll: float
    n_tokens: int
    answer: tuple[int, ...] = ()


def open_for(
    model: Model, examples: Sequence[TokenisedExample], *, hidden: bool = False
) -> AbstractContextManager[Context]:
    """A context for passes over these examples; with low_ram it is no larger than they need.

    Args:
        hidden: see open_context.

    Raises:
        EngineError: see open_context.
    """
    if not model.options.low_ram:
        return open_context(model, n_ctx=_N_CTX, hidden=hidden)
    longest = max((example.n_tokens for example in examples), default=0)
    n_ctx = min(_N_CTX, max(_LOW_RAM_CELLS, longest))
    return open_context(model, n_ctx=n_ctx, n_batch=_LOW_RAM_BATCH, hidden=hidden)


def mean_loss(scores: Sequence[Score]) -> float:
    """Nats for each completion token over all examples."""
    n_tokens = sum(score.n_tokens for score in scores)
    return sum(score.nll for score in scores) / n_tokens if n_tokens else float("nan")


def paired_interval(
    scores: Sequence[Score], base: Sequence[Score], seed: int
) -> tuple[float, float, float]:
    """95 % paired bootstrap interval (low, mid, high) of the difference in nats a token."""
    differences = np.array([s.nll - b.nll for s, b in zip(scores, base, strict=True)])
    weights = np.array([s.n_tokens for s in scores], float)
    return paired_bootstrap(differences, weights, seed=seed)


def score(
    context: Context,
    examples: Sequence[TokenisedExample],
    *,
    max_answer: int = 0,
    progress: Callable[[int], None] = lambda n_examples: None,
) -> list[Score]:
    """Score completions under the adapters that `context` has applied.

    The prefix that all prompts share is computed once; several examples share each batch. With
    `max_answer`, a greedy answer of at most that many tokens is generated from the prompt's own
    KV cells, so that the prompt is never computed twice.

    Raises:
        EngineError: an example is longer than the context (its line is named; nothing is cut).
    """
    refuse_overlong(context, examples, max_answer)
    n_shared = start_shared(context, examples)
    scores: list[Score] = []
    for group in grouped(context, examples, n_shared, max_answer):
        scores += _score_group(context, group, n_shared, max_answer)
        for sequence in range(len(group)):
            context.truncate(sequence, n_shared)
        progress(len(group))
    return scores


def start_shared(context: Context, examples: Sequence[TokenisedExample]) -> int:
    """Forget all, compute the prefix that all prompts share, and lend it to every sequence."""
    context.clear()
    n_shared = shared_prefix([example.prompt for example in examples])
    if n_shared:
        prefix = [Row(token, i, 0) for i, token in enumerate(examples[0].prompt[:n_shared])]
        for _ in _decode_all(context, prefix):
            pass
        for sequence in range(1, context.n_sequences):
            context.copy_sequence(0, sequence)
    return n_shared


def completion_rows(group: Sequence[TokenisedExample], n_shared: int) -> list[Row]:
    """The tokens of a group after the shared prefix; those that predict a completion are outputs.

    The last token of a completion predicts nothing that is scored, so it is left out.
    """
    rows: list[Row] = []
    for sequence, example in enumerate(group):
        ids = example.prompt + example.completion[:-1]
        n_prompt = len(example.prompt)
        rows += (
            Row(ids[i], i, sequence, output=i >= n_prompt - 1) for i in range(n_shared, len(ids))
        )
    return rows


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the prefix common to all prompts, less than the shortest; 0 when not worth it."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    limit = min(len(prompt) for prompt in prompts) - 1
    n = 0
    while n < limit and first[n] == last[n]:
        n += 1
    return n if n >= _MIN_SHARED else 0


def count_tokens(examples: Sequence[TokenisedExample]) -> int:
    """Tokens that `score` computes for these examples, the shared prefix counted once."""
    n_shared = shared_prefix([example.prompt for example in examples])
    return n_shared + sum(
        len(e.prompt) + max(0, len(e.completion) - 1) - n_shared for e in examples
    )


def _score_group(
    context: Context, group: Sequence[TokenisedExample], n_shared: int, max_answer: int
) -> list[Score]:
    rows = completion_rows(group, n_shared)
    targets = [
        (sequence, token)
        for sequence, example in enumerate(group)
        for token in example.completion or (-1,)
    ]
    nll = np.zeros(len(group))
    first = np.full(len(group), -1)
    position = 0
    for logits in _decode_all(context, rows):
        if not len(logits):  # a batch of prompt tokens only
            continue
        here = targets[position : position + len(logits)]
        log_p = log_likelihoods(logits, np.array([token for _, token in here]))
        for offset, (sequence, token) in enumerate(here):
            if first[sequence] < 0:
                first[sequence] = int(logits[offset].argmax())
            nll[sequence] -= log_p[offset] if token >= 0 else 0.0
        position += len(logits)
    answers = _greedy(context, group, first, max_answer)
    return [
        Score(float(nll[i]), len(example.completion), tuple(answers[i]))
        for i, example in enumerate(group)
    ]


def _greedy(
    context: Context,
    group: Sequence[TokenisedExample],
    first: NDArray[np.int64],
    max_answer: int,
) -> list[list[int]]:
    """Greedy continuations of all prompts of a group, one token of each in every batch."""
    answers: list[list[int]] = [[] for _ in group]
    if max_answer <= 0:
        return answers
    for sequence, example in enumerate(group):
        context.truncate(sequence, len(example.prompt))
    upcoming = {sequence: int(first[sequence]) for sequence in range(len(group))}
    while True:
        upcoming = {
            s: token
            for s, token in upcoming.items()
            if not context.model.vocabulary.is_end(token) and len(answers[s]) < max_answer
        }
        if not upcoming:
            return answers
        rows = []
        for s, token in upcoming.items():
            rows.append(Row(token, len(group[s].prompt) + len(answers[s]), s, output=True))
            answers[s].append(token)
        best = context.decode(rows).argmax(axis=1)
        upcoming = {s: int(best[i]) for i, s in enumerate(upcoming)}


def log_likelihoods(
    logits: NDArray[np.float32], targets: NDArray[np.integer]
) -> NDArray[np.float64]:
    """log softmax(logits)[target] of each row, (n,) float64; stable by the row's maximum."""
    top = logits.max(axis=1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
    picked = logits[np.arange(len(logits)), targets].astype(np.float64)
    return np.asarray(picked - log_z)


def _decode_all(context: Context, rows: Sequence[Row]) -> Iterator[NDArray[np.float32]]:
    """Logits of the output rows, batch after batch; each is gone with the next."""
    for start in range(0, len(rows), context.n_batch):
        yield context.decode(rows[start : start + context.n_batch])


def grouped(
    context: Context, examples: Sequence[TokenisedExample], n_shared: int, max_answer: int
) -> Iterator[list[TokenisedExample]]:
    """Consecutive examples that fit the context's sequences and cells together."""
    group: list[TokenisedExample] = []
    used = n_shared
    for example in examples:
        need = _cells(example, max_answer) - n_shared
        if group and (len(group) == context.n_sequences or used + need > context.n_ctx):
            yield group
            group, used = [], n_shared
        group.append(example)
        used += need
    if group:
        yield group


def _cells(example: TokenisedExample, max_answer: int) -> int:
    return len(example.prompt) + max(len(example.completion), max_answer)


def refuse_overlong(
    context: Context, examples: Sequence[TokenisedExample], max_answer: int
) -> None:
    """Raise EngineError with the lines that do not fit the context."""
    problems = [
        f"line {example.line}: {_cells(example, max_answer)} tokens"
        for example in examples
        if _cells(example, max_answer) > context.n_ctx
    ]
    problems += [f"line {e.line}: an empty prompt" for e in examples if not e.prompt]
    if problems:
        raise EngineError(
            f"examples that do not fit a context of {context.n_ctx} tokens",
            problems=problems,
            hint="Shorten or remove these lines; EdgeLoRA never cuts a text silently.",
        )
