"""POST /v1/embeddings: mean-pooled hidden states of the base or of an adapter, of length 1."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from numpy.typing import NDArray
from starlette.datastructures import State
from starlette.responses import Response

from edgelora.serve.answering import whole_or_gone
from edgelora.serve.jobs import QueueFull
from edgelora.serve.openai_errors import bad_request, responses
from edgelora.serve.preparing import choose_model, plain_ids, room
from edgelora.serve.schema import EmbeddingBody
from edgelora.serve.served import AUTO
from edgelora.serve.streaming import encode

if TYPE_CHECKING:
    from edgelora.serve.server import Server

_RETRY_S = 2.0

router = APIRouter()


@router.post("/v1/embeddings", responses=responses(404, 429))
async def create_embeddings(body: EmbeddingBody, request: Request) -> Response:
    """Embed texts or token ids; each vector is the mean over all tokens, scaled to length 1."""
    server: Server = request.app.state.server
    texts = await run_in_threadpool(_prepare, server, body)
    target = await choose_model(server, body, texts)
    with _place(request.app.state, server):
        embedding = asyncio.wrap_future(server.scheduler.embed(texts, target.adapters))

        async def answer() -> bytes:
            vectors = await embedding
            n_tokens = sum(map(len, texts))
            return await run_in_threadpool(_shaped, body, target.id, vectors, n_tokens)

        try:
            return await whole_or_gone(request, answer())
        finally:
            embedding.cancel()


@contextlib.contextmanager
def _place(state: State, server: Server) -> Iterator[None]:
    """One of the places for embeddings, as many as generations may wait; only the loop counts.

    Raises:
        QueueFull: all are taken.
    """
    n_taken = getattr(state, "n_embeddings", 0)
    if n_taken > server.settings.max_queue:
        raise QueueFull(_RETRY_S)
    state.n_embeddings = n_taken + 1
    try:
        yield
    finally:
        state.n_embeddings -= 1


def _prepare(server: Server, body: EmbeddingBody) -> list[tuple[int, ...]]:
    if body.model == AUTO:
        raise bad_request("an embedding is made with a model that is named, not 'auto'", "model")
    n_embd = server.model.n_embd
    if body.dimensions not in (None, n_embd):
        raise bad_request(f"this model's embeddings have {n_embd} dimensions", "dimensions")
    most = server.settings.limits.max_inputs
    if len(body.input) > most:
        raise bad_request(f"{len(body.input)} inputs, at most {most} are possible", "input")
    texts = [plain_ids(server, text, "input") for text in body.input]
    for text in texts:
        room(len(text), 0, server.scheduler.limits.n_ctx, default=None, param="input")
    return texts


def _shaped(
    body: EmbeddingBody, model_id: str, vectors: NDArray[np.float32], n_tokens: int
) -> bytes:
    """OpenAI's list of embeddings as JSON; for thousands of vectors that takes a while."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype("<f4")
    answer: dict[str, Any] = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(unit, body.encoding_format)}
            for i, unit in enumerate(units)
        ],
        "model": model_id,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
    return encode(answer)


def _encoded(vector: NDArray[np.float32], encoding: str | None) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.tobytes()).decode("ascii")
    return vector.tolist()  # type: ignore[no-any-return]
