"""litellm as its documentation configures it for an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from server_process import ADAPTER, BASE_ID, asked, held_out

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for the models' prices

pytestmark = [
    pytest.mark.clients,
    # Its own, of pydantic, asyncio and aiohttp, none of which the server can do anything about.
    pytest.mark.filterwarnings("ignore"),
]

GREEDY: Any = {"temperature": 0.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    """The library; it takes seconds to import, and leaves sockets and an event loop open."""
    import litellm

    yield litellm
    litellm.in_memory_llm_clients_cache.flush_cache()
    with warnings.catch_warnings(action="ignore"):
        asyncio.set_event_loop(None)
        gc.collect()


@pytest.fixture(scope="module")
def at(url: str) -> dict[str, Any]:
    """What every call is given."""
    return {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}


def test_a_chat_whole_and_streamed(litellm: Any, at: dict[str, Any]) -> None:
    line = held_out(1)[0]
    ask = {"model": f"openai/{ADAPTER.stem}", "messages": asked(line["prompt"]), **GREEDY, **at}
    whole = litellm.completion(**ask)
    said = whole.choices[0].message.content
    assert said.strip() == line["completion"] and whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    options = {"include_usage": True}
    chunks = list(litellm.completion(stream=True, stream_options=options, **ask))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
    rebuilt = litellm.stream_chunk_builder(chunks)
    assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens
    assert rebuilt.choices[0].finish_reason == "stop"


def test_many_at_once(litellm: Any, at: dict[str, Any]) -> None:
    lines = held_out(8)

    async def ask_all() -> list[Any]:
        asks = (
            litellm.acompletion(
                model=f"openai/{ADAPTER.stem}", messages=asked(line["prompt"]), **GREEDY, **at
            )
            for line in lines
        )
        return await asyncio.gather(*asks)

    answers = [answer.choices[0].message.content.strip() for answer in asyncio.run(ask_all())]
    right = sum(a == line["completion"] for a, line in zip(answers, lines, strict=True))
    assert right >= 5


def test_a_tool_and_a_schema(litellm: Any, at: dict[str, Any], weather: Any) -> None:
    ask = {"model": f"openai/{BASE_ID}", "temperature": 0.0, "max_tokens": 120, **at}
    answer = litellm.completion(
        messages=asked("Weather in Rome, in C?"),
        tools=[weather],
        tool_choice="required",
        parallel_tool_calls=False,  # this small model goes on calling
        **ask,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}
    schema = weather["function"]["parameters"]
    format_ = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    answer = litellm.completion(messages=asked("Where is it warm?"), response_format=format_, **ask)
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "unit"}


def test_text_completions_and_embeddings(litellm: Any, at: dict[str, Any]) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{BASE_ID}", prompt="1, 2, 3,", logprobs=1, **GREEDY, **at
    )
    assert "4" in answer.choices[0].text
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens
    rows = litellm.embedding(model=f"openai/{BASE_ID}", input=["a cat", "a dog"], **at).data
    assert [len(row["embedding"]) for row in rows] == [576, 576]


def test_errors_are_litellms_own_classes(litellm: Any, at: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError, match=ADAPTER.stem):
        litellm.completion(model="openai/no-such", messages=asked("hi"), **at)
    with pytest.raises(litellm.ContextWindowExceededError, match="2048"):
        litellm.completion(model=f"openai/{BASE_ID}", messages=asked("word " * 5000), **at)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(
            model=f"openai/{BASE_ID}", messages=asked("hi"), **{**at, "temperature": 9.0}
        )
