"""POST /v1/embeddings over real HTTP: the engine's own vectors, of length 1."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pico
import pytest
from alone import Alone, alone
from openai.types import CreateEmbeddingResponse
from serving import Running, running

from edgelora.engine.model import WeightedAdapter

PATH = "/v1/embeddings"
TEXTS = ["the cat", "he was on the hat", "the cat"]


@dataclass
class Setup:
    running: Running
    http: httpx.Client
    alone: Alone
    adapter: Path

    def post(self, **body: Any) -> dict[str, Any]:
        answer = self.http.post(PATH, json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def vectors(self, **body: Any) -> np.ndarray:
        answer = self.post(**body)
        assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
        return np.array([entry["embedding"] for entry in answer["data"]])

    def expected(self, *texts: str, weight: float = 0.0) -> np.ndarray:
        adapters = [WeightedAdapter(self.adapter, weight)] if weight else []
        return np.array([self.alone.embedding(self.alone.ids(t), *adapters) for t in texts])


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("embeddings")
    base = pico.write_base(folder / "base.gguf")
    adapter = pico.write_random_lora(folder / "own.gguf", base, size=2.0)
    with (
        running(base, [adapter]) as server,
        alone(base) as reference,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield Setup(server, http, reference, adapter)


def test_the_vectors_are_the_engine_s(setup: Setup) -> None:
    answer = setup.post(input=TEXTS, model="base", encoding_format="float")
    CreateEmbeddingResponse.model_validate(answer)
    assert answer["object"] == "list" and answer["model"] == "base"
    assert all(entry["object"] == "embedding" for entry in answer["data"])
    n_tokens = sum(len(setup.alone.ids(text)) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    vectors = np.array([entry["embedding"] for entry in answer["data"]])
    np.testing.assert_allclose(vectors, setup.expected(*TEXTS), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)


def test_every_shape_of_input(setup: Setup) -> None:
    expected = setup.expected(TEXTS[0])
    ids = setup.alone.ids(TEXTS[0])
    for given in (TEXTS[0], [TEXTS[0]], ids, [ids]):
        np.testing.assert_allclose(setup.vectors(input=given), expected, atol=1e-5)
    both = setup.vectors(input=[ids, setup.alone.ids(TEXTS[1])])
    np.testing.assert_allclose(both, setup.expected(*TEXTS[:2]), atol=1e-5)


def test_base64_is_the_same_numbers(setup: Setup) -> None:
    floats = setup.vectors(input=TEXTS)
    for entry, expected in zip(
        setup.post(input=TEXTS, encoding_format="base64")["data"], floats, strict=True
    ):
        decoded = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
        np.testing.assert_array_equal(decoded, expected.astype(np.float32))


def test_an_adapter_embeds_too(setup: Setup) -> None:
    own = setup.vectors(input=TEXTS, model="own")
    np.testing.assert_allclose(own, setup.expected(*TEXTS, weight=1.0), atol=1e-5)
    assert np.abs(own - setup.expected(*TEXTS)).max() > 0.01
    half = setup.vectors(input=TEXTS, lora=[{"name": "own", "scale": 0.5}])
    np.testing.assert_allclose(half, setup.expected(*TEXTS, weight=0.5), atol=1e-5)
    off = setup.vectors(input=TEXTS, model="own", lora=[{"name": "own", "scale": 0}])
    np.testing.assert_allclose(off, setup.expected(*TEXTS), atol=1e-6)


def test_many_texts(setup: Setup) -> None:
    texts = [f"the {'cat ' * (i % 40)}" for i in range(200)]
    vectors = setup.vectors(input=texts)
    # The shape of a batch changes the order of float sums; its keys and values are F16.
    np.testing.assert_allclose(vectors, setup.expected(*texts), atol=1e-3)


def test_a_text_longer_than_the_context_is_refused(setup: Setup) -> None:
    ids = (setup.alone.ids("the cat and") * 200)[:256]
    assert setup.vectors(input=ids).shape == (1, setup.alone.model.n_embd)
    answer = setup.http.post(PATH, json={"input": [ids, [*ids, 5]]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert "256" in error["message"] and "257" in error["message"]


def test_the_openai_client(setup: Setup) -> None:
    with openai.OpenAI(base_url=f"{setup.running.url}/v1", api_key="x", max_retries=0) as client:
        # It asks for base64 by itself, and decodes it.
        answer = client.embeddings.create(model="own", input=TEXTS)
        vectors = np.array([entry.embedding for entry in answer.data])
        np.testing.assert_allclose(vectors, setup.expected(*TEXTS, weight=1.0), atol=1e-5)
        with pytest.raises(openai.NotFoundError, match="Known models"):
            client.embeddings.create(model="text-embedding-3-small", input="the")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "model": "auto"}, "model"),
        ({"input": "a", "user": 5}, "user"),
    ],
)
def test_what_is_refused_names_its_field(setup: Setup, body: dict[str, Any], param: str) -> None:
    answer = setup.http.post(PATH, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_all_dimensions_may_be_asked_for(setup: Setup) -> None:
    n_embd = setup.alone.model.n_embd
    assert setup.vectors(input="the", dimensions=n_embd).shape == (1, n_embd)


def test_an_empty_text_is_refused_where_nothing_begins_a_text(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf", "qwen2")
    with running(base) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        for path, field in ((PATH, "input"), ("/v1/completions", "prompt")):
            answer = http.post(path, json={field: ""})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == field


def test_the_places_for_embeddings_are_bounded(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    with running(base, max_queue=0) as server:

        async def both() -> list[int]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
                long = {"input": [[5] * 256] * 100}
                answers = await asyncio.gather(*(http.post(PATH, json=long) for _ in range(3)))
                return [answer.status_code for answer in answers]

        assert sorted(asyncio.run(both())) == [200, 429, 429]
        assert httpx.post(f"{server.url}{PATH}", json={"input": "the"}).status_code == 200


def test_a_client_that_leaves_ends_its_embedding(setup: Setup) -> None:
    long = (setup.alone.ids("the cat and") * 200)[:256]
    with pytest.raises(httpx.ReadTimeout):
        setup.http.post(PATH, json={"input": [long] * 2048}, timeout=0.3)
    np.testing.assert_allclose(setup.vectors(input="the"), setup.expected("the"), atol=1e-5)
