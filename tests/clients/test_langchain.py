"""langchain-openai with a base_url: chat models, tools, structured output, embeddings."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from server_process import ADAPTER, BASE_ID, held_out

pytestmark = [
    pytest.mark.clients,
    # Deprecations inside langchain and pydantic.
    pytest.mark.filterwarnings("ignore"),
]


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=30, description="Its name.")
    unit: Literal["C", "F"]


@pytest.fixture(scope="module")
def at(url: str) -> dict[str, Any]:
    """What every model is made with; token counts come with streams too."""
    return {"base_url": f"{url}/v1", "api_key": "none", "temperature": 0.0, "max_retries": 0}


@pytest.fixture(scope="module")
def chat(at: dict[str, Any]) -> Any:
    """The adapter as a chat model."""
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=ADAPTER.stem, max_tokens=24, stream_usage=True, **at)


def test_a_chain_answers_one_and_many(chat: Any) -> None:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    chain = ChatPromptTemplate.from_messages([("user", "{letter}")]) | chat | StrOutputParser()
    lines = held_out(8)
    one = chain.invoke({"letter": lines[0]["prompt"]})
    assert one.strip() == lines[0]["completion"]
    many = chain.batch([{"letter": line["prompt"]} for line in lines])
    right = sum(a.strip() == line["completion"] for a, line in zip(many, lines, strict=True))
    assert right >= 5


def test_a_stream_adds_up_to_the_whole(chat: Any) -> None:
    prompt = held_out(1)[0]["prompt"]
    whole = chat.invoke(prompt)
    chunks = list(chat.stream(prompt))
    total = sum(chunks[1:], chunks[0])
    assert len(chunks) > 2 and total.content == whole.content
    assert total.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert total.response_metadata["finish_reason"] == "stop"


def test_log_probabilities(chat: Any) -> None:
    told = chat.bind(logprobs=True, top_logprobs=2).invoke(held_out(1)[0]["prompt"])
    tokens = told.response_metadata["logprobs"]["content"]
    assert len(tokens) == told.usage_metadata["output_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


def test_tools_and_structured_output(at: dict[str, Any]) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    base = ChatOpenAI(model=BASE_ID, max_tokens=120, **at)
    question = HumanMessage("What is the weather in Rome, in C?")
    caller = base.bind_tools([Weather], tool_choice="required", parallel_tool_calls=False)
    called = caller.invoke([question])
    (call,) = called.tool_calls
    assert call["name"] == "Weather" and set(call["args"]) == {"city", "unit"}
    result = ToolMessage("sunny, 21 C", tool_call_id=call["id"])
    assert base.bind_tools([Weather], tool_choice="none").invoke([question, called, result]).content
    for method in ("json_schema", "function_calling"):
        weather = base.with_structured_output(Weather, method=method).invoke([question])
        assert isinstance(weather, Weather), method


def test_text_completions(at: dict[str, Any]) -> None:
    from langchain_openai import OpenAI

    base = OpenAI(model=BASE_ID, max_tokens=8, **at)
    assert "4" in base.invoke("1, 2, 3,")
    assert "".join(base.stream("1, 2, 3,")) == base.invoke("1, 2, 3,")


def test_embeddings(url: str) -> None:
    """With check_embedding_ctx_length it fetches OpenAI's tokeniser, and would send its ids."""
    from langchain_openai import OpenAIEmbeddings

    model = OpenAIEmbeddings(
        model=BASE_ID, base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    rows = model.embed_documents(["The cat sat on the mat.", "Revenue fell by 3 %."])
    query = model.embed_query("A cat sits on a mat.")
    near, far = (sum(x * y for x, y in zip(row, query, strict=True)) for row in rows)
    assert near > far


def test_errors_are_those_of_the_openai_client(at: dict[str, Any]) -> None:
    from langchain_openai import ChatOpenAI

    with pytest.raises(openai.NotFoundError, match=ADAPTER.stem):
        ChatOpenAI(model="no-such", **at).invoke("hi")
    with pytest.raises(openai.BadRequestError, match="2048"):
        ChatOpenAI(model=BASE_ID, **at).invoke("word " * 5000)
