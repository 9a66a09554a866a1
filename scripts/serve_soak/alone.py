"""The same requests answered by the engine alone, one after the other, from an empty context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.datasets.segments import Segment
from edgelora.engine.context import Context, Row, open_context
from edgelora.engine.embed import embed
from edgelora.engine.grammar import json_schema_to_gbnf
from edgelora.engine.logprobs import logprobs
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template
from edgelora.engine.sampling import Sampling, open_sampler
from serve_soak.questions import CHAT, EMBEDDINGS, Question, Weights


@dataclass(frozen=True)
class Step:
    """One token of an answer; its text is empty where it ended the answer.

    Attributes:
        logprob: None for the first token of a prompt.
        lead: how far the likeliest token was before the next one, in nats.
    """

    text: bytes
    logprob: float | None
    lead: float = float("inf")


@dataclass(frozen=True)
class Answer:
    """One choice: its text, why it ended, and its tokens (those of the prompt too, with echo)."""

    text: str
    reason: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class _Wanted:
    """One choice as the engine has to make it; `echo` is the text to begin with."""

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    echo: str
    ignore_eos: bool


class Alone:
    """A base of its own, without a server."""

    def __init__(
        self, model: Model, context: Context, hidden: Context, paths: Mapping[str, Path]
    ) -> None:
        self._model = model
        self._context = context
        self._hidden = hidden
        self._paths = paths
        self._template = model_template(model)

    def answers(
        self, question: Question, noise: float = 0.0, rng: np.random.Generator | None = None
    ) -> list[Answer]:
        """All choices of a question.

        Args:
            noise: added to every logit, evenly drawn from -noise to noise.
        """
        self._context.apply(self._adapters(question.weights))
        rng = rng or np.random.default_rng(0)
        return [self._answer(wanted, noise, rng) for wanted in self._wanted(question)]

    def vectors(self, question: Question) -> NDArray[np.float32]:
        """The embeddings of a question's texts, (n, d) float32 of length 1."""
        assert isinstance(question.body, dict)
        self._hidden.apply(self._adapters(question.weights))
        rows = embed(self._hidden, [self._plain(text) for text in question.body["input"]])
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    def _adapters(self, weights: Weights) -> list[WeightedAdapter]:
        return [WeightedAdapter(self._paths[name], weight) for name, weight in weights]

    def _wanted(self, question: Question) -> list[_Wanted]:
        body = question.body
        assert isinstance(body, dict) and question.path != EMBEDDINGS
        texts = body.get("prompt", "")
        texts = [texts] if isinstance(texts, str) else texts
        sampling = _sampling(body)
        return [
            _Wanted(
                self._chat(body) if question.path == CHAT else self._plain(text),
                replace(sampling, seed=sampling.seed + i),
                body["max_tokens"],
                tuple(body.get("stop", ())),
                text if body.get("echo") else "",
                bool(body.get("ignore_eos")),
            )
            for text in texts
            for i in range(body.get("n", 1))
        ]

    def _chat(self, body: dict[str, Any]) -> tuple[int, ...]:
        segments = self._template.render_chat(body["messages"])
        return tuple(self._model.vocabulary.tokenize_segments(segments))

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._model.vocabulary.tokenize_segments([Segment(text, False)]))

    def _answer(self, wanted: _Wanted, noise: float, rng: np.random.Generator) -> Answer:
        context, vocabulary = self._context, self._model.vocabulary
        context.clear()
        ids = wanted.prompt
        last = len(ids) - 1
        echo = bool(wanted.echo)
        rows = [Row(token, i, 0, output=echo or i == last) for i, token in enumerate(ids)]
        logits = context.decode(rows)
        steps = self._echoed(wanted, logits) if echo else []
        n_echoed, text, reason = len(steps), "", "length"
        sampler = open_sampler(self._model, wanted.sampling, ids, ignore_eos=wanted.ignore_eos)
        with contextlib.closing(sampler):
            for position in range(len(ids), len(ids) + wanted.max_tokens):
                if noise:
                    # In llama.cpp's own buffer, which its samplers read.
                    logits += rng.uniform(-noise, noise, logits.shape).astype(np.float32)
                token = sampler.sample(context, -1, logits[-1])
                ended = sampler.ended or vocabulary.is_end(token)
                steps.append(_step(b"" if ended else vocabulary.decode([token]), token, logits))
                text = _text(steps[n_echoed:])
                stop = _found(text, wanted.stop)
                if ended or stop is not None:
                    text, reason = text[:stop], "stop"
                    break
                logits = context.decode([Row(token, position, 0, output=True)])
        return Answer(_text(steps[:n_echoed]) + text, reason, tuple(steps))

    def _echoed(self, wanted: _Wanted, logits: NDArray[np.float32]) -> list[Step]:
        ids = wanted.prompt
        known = logprobs(logits[:-1], list(ids[1:])).chosen
        texts = [self._model.vocabulary.decode([token]) for token in ids]
        # SentencePiece puts a space before a text: a token has it, the echo does not. BOS has none.
        first = next(i for i, text in enumerate(texts) if text)
        texts[first] = texts[first][sum(map(len, texts)) - len(wanted.echo.encode()) :]
        chosen: list[float | None] = [None, *map(float, known)]
        return [Step(text, logprob) for text, logprob in zip(texts, chosen, strict=True)]


@contextlib.contextmanager
def open_alone(
    base: Path, paths: Mapping[str, Path], *, n_threads: int, n_ctx: int
) -> Iterator[Alone]:
    """Open a base with F32 keys and values; embeddings use what the server embeds with."""
    with (
        open_model(base, ModelOptions(n_threads)) as model,
        open_context(model, n_ctx=n_ctx, n_sequences=1, exact=True) as context,
        open_context(model, n_ctx=512, n_batch=512, hidden=True) as hidden,
    ):
        yield Alone(model, context, hidden, paths)


def _sampling(body: dict[str, Any]) -> Sampling:
    format_ = body.get("response_format")
    grammar = json_schema_to_gbnf(format_["json_schema"]["schema"]) if format_ else ""
    names = ("temperature", "top_p", "top_k", "seed")
    return Sampling(grammar=grammar, **{name: body[name] for name in names if name in body})


def _step(text: bytes, token: int, logits: NDArray[np.float32]) -> Step:
    """The logits are the model's own: what a grammar forbids takes no part in them."""
    row = logits[-1:]
    second, best = np.partition(row[0], -2)[-2:]
    logprob = float(logprobs(row, [token]).chosen[0]) if token >= 0 else None
    return Step(text, logprob, float(best - second))


def _text(steps: Sequence[Step]) -> str:
    return b"".join(step.text for step in steps).decode("utf-8", "replace")


def _found(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None
