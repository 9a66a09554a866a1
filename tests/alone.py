"""What the engine answers to one prompt by itself: the reference for answers of the server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edgelora.datasets.records import Message
from edgelora.engine.context import Context, open_context
from edgelora.engine.embed import embed
from edgelora.engine.generate import Sampling, stream
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template
from edgelora.engine.score import TokenisedExample, score


class Alone:
    """A base of its own, without a server; every answer is computed from an empty context."""

    def __init__(self, model: Model, context: Context, hidden: Context) -> None:
        self.model = model
        self._context = context
        self._hidden = hidden

    def prompt(self, *turns: tuple[str, str]) -> list[int]:
        """Token ids of a conversation, as the base's own template renders it."""
        segments = model_template(self.model).render([Message(*turn) for turn in turns])
        return self.model.vocabulary.tokenize_segments(segments)

    def ids(self, text: str) -> list[int]:
        """Token ids of a plain text, BOS first where the vocabulary asks for it."""
        vocabulary = self.model.vocabulary
        return [vocabulary.bos] * vocabulary.adds_bos + vocabulary.tokenize(text)

    def answer(
        self, prompt: Sequence[int], n: int, *adapters: WeightedAdapter, **sampling: float
    ) -> str:
        """At most `n` tokens; greedy unless `sampling` says otherwise."""
        self._context.apply(list(adapters))
        chosen = Sampling(**sampling)  # type: ignore[arg-type]
        return "".join(stream(self._context, prompt, max_tokens=n, sampling=chosen))

    def log_likelihood(
        self, prompt: Sequence[int], completion: Sequence[int], *adapters: WeightedAdapter
    ) -> float:
        """Summed over the completion's tokens."""
        self._context.apply(list(adapters))
        example = TokenisedExample(tuple(prompt), tuple(completion))
        return -score(self._context, [example])[0].nll

    def embedding(self, ids: Sequence[int], *adapters: WeightedAdapter) -> np.ndarray:
        """Of length 1."""
        self._hidden.apply(list(adapters))
        vector = embed(self._hidden, [ids])[0]
        return vector / np.linalg.norm(vector)


@contextlib.contextmanager
def alone(base: Path) -> Iterator[Alone]:
    """Open a base for reference answers."""
    with (
        open_model(base, ModelOptions(n_threads=1)) as model,
        open_context(model, n_ctx=512, n_batch=64, n_sequences=4) as context,
        open_context(model, n_ctx=512, n_batch=512, n_sequences=4, hidden=True) as hidden,
    ):
        yield Alone(model, context, hidden)
