"""OpenAI's own Python client against `edgelora serve`."""

from __future__ import annotations

import concurrent.futures
import json
import math
from typing import Any

import openai
import pytest
from server_process import ADAPTER, BASE_ID, asked, held_out, serve

pytestmark = pytest.mark.clients

GREEDY: Any = {"temperature": 0.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    """The client as its documentation configures it for another server."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_models_are_the_base_and_the_adapter(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {BASE_ID, ADAPTER.stem}
    assert client.models.retrieve(ADAPTER.stem).id == ADAPTER.stem


def test_the_adapter_answers_more_held_out_lines_than_the_base(client: openai.OpenAI) -> None:
    lines = held_out(12)
    right = dict.fromkeys((BASE_ID, ADAPTER.stem), 0)
    for model in right:
        for line in lines:
            answer = client.chat.completions.create(
                model=model, messages=asked(line["prompt"]), **GREEDY
            )
            said = answer.choices[0].message.content or ""
            right[model] += said.strip() == line["completion"].strip()
    assert right[ADAPTER.stem] > right[BASE_ID]


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    ask: Any = {"model": ADAPTER.stem, "messages": asked(held_out(1)[0]["prompt"]), **GREEDY}
    whole = client.chat.completions.create(**ask)
    chunks = list(
        client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask)
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert whole.usage and chunks[-1].usage
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_log_probabilities_of_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=BASE_ID, messages=asked("Say hello."), logprobs=True, top_logprobs=3, **GREEDY
    )
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert math.isclose(token.logprob, token.top_logprobs[0].logprob)
    assert answer.usage
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


def test_several_answers_and_seeds(client: openai.OpenAI) -> None:
    ask: Any = {"model": BASE_ID, "messages": asked("Tell me a story."), "max_tokens": 12}
    first = client.chat.completions.create(n=3, seed=7, temperature=1.0, **ask)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert [choice.finish_reason for choice in first.choices] == ["length"] * 3


def test_completions_echo_the_prompt_with_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=BASE_ID, prompt="Paris is the capital", echo=True, logprobs=1, max_tokens=4,
        temperature=0.0,
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.text.startswith("Paris is the capital")
    assert choice.logprobs and choice.logprobs.token_logprobs and choice.logprobs.tokens
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert "".join(choice.logprobs.tokens) == choice.text


def test_stop_strings_never_leak(client: openai.OpenAI) -> None:
    ask: Any = {"model": BASE_ID, "prompt": "1 2 3 4 5 6", "max_tokens": 24, "temperature": 0.0}
    free = client.completions.create(**ask).choices[0].text
    stop = free[4:9]
    cut = client.completions.create(stop=[stop], **ask).choices[0]
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


def test_embeddings_are_of_unit_length_and_near_for_like_texts(client: openai.OpenAI) -> None:
    texts = ["The cat sat on the mat.", "A cat sits on a mat.", "Quarterly revenue fell by 3 %."]
    rows = [entry.embedding for entry in client.embeddings.create(model=BASE_ID, input=texts).data]
    plain = client.embeddings.create(model=BASE_ID, input=texts, encoding_format="float").data
    for row, entry in zip(rows, plain, strict=True):
        assert math.isclose(sum(value * value for value in row), 1.0, rel_tol=1e-5)
        assert row == pytest.approx(entry.embedding, abs=1e-6)

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert dot(rows[0], rows[1]) > dot(rows[0], rows[2])


def test_a_tool_is_called_and_its_result_taken(client: openai.OpenAI, weather: Any) -> None:
    conversation = asked("What is the weather in Rome, in C?")
    ask: Any = {"model": BASE_ID, "tools": [weather], "temperature": 0.0, "max_tokens": 120}
    ask["parallel_tool_calls"] = False  # this small model goes on calling
    first = client.chat.completions.create(
        messages=conversation, tool_choice="required", **ask
    ).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.tool_calls
    call: Any = first.message.tool_calls[0]
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("C", "F")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 C"}
    conversation += [first.message.model_dump(exclude_none=True), result]
    then = client.chat.completions.create(messages=conversation, tool_choice="none", **ask)
    assert then.choices[0].message.content


def test_a_streamed_tool_call_is_the_same(client: openai.OpenAI, weather: Any) -> None:
    ask: Any = {
        "model": BASE_ID, "messages": asked("Weather in Oslo?"), "tools": [weather],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "temperature": 0.0, "max_tokens": 120,
    }  # fmt: skip
    whole: Any = client.chat.completions.create(**ask).choices[0].message.tool_calls
    name, arguments, reasons = "", "", []
    for chunk in client.chat.completions.create(stream=True, **ask):
        delta = chunk.choices[0].delta
        reasons.append(chunk.choices[0].finish_reason)
        for call in delta.tool_calls or []:
            assert call.function
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, arguments) == (whole[0].function.name, whole[0].function.arguments)
    assert reasons[-1] == "tool_calls"


def test_a_schema_shapes_the_answer(client: openai.OpenAI, weather: Any) -> None:
    schema = weather["function"]["parameters"]
    answer = client.chat.completions.create(
        model=BASE_ID,
        messages=asked("Where is it warm?"),
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
        temperature=1.0,
        max_tokens=120,
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city", "unit"}


def test_responses(client: openai.OpenAI) -> None:
    ask: Any = {"model": ADAPTER.stem, "input": held_out(1)[0]["prompt"], "temperature": 0.0}
    whole = client.responses.create(max_output_tokens=16, **ask)
    with client.responses.stream(max_output_tokens=16, **ask) as stream:
        streamed = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert whole.output_text == streamed == final.output_text != ""


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no-such", messages=asked("hi"))
    assert missing.value.code == "model_not_found" and ADAPTER.stem in missing.value.message
    with pytest.raises(openai.BadRequestError) as overflow:
        client.completions.create(model=BASE_ID, prompt="word " * 5000)
    assert overflow.value.code == "context_length_exceeded" and "2048" in overflow.value.message
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=BASE_ID, messages=asked("hi"), temperature=9.0)
    assert wrong.value.param == "temperature"
    bad: Any = {"name": "x", "schema": {"type": "number", "multipleOf": 3}}
    with pytest.raises(openai.BadRequestError) as schema:
        client.chat.completions.create(
            model=BASE_ID,
            messages=asked("hi"),
            response_format={"type": "json_schema", "json_schema": bad},
        )
    assert "multipleOf" in schema.value.message


def test_a_key_is_asked_for_and_a_full_queue_is_tried_again() -> None:
    options = ("--base", BASE_ID, "--slots", "1", "--context", "512", "--max-queue", "1")
    with serve(*options, env={"EDGELORA_API_KEY": "right"}) as server:
        stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="right", max_retries=20)

        def ask(i: int) -> str | None:
            answer = client.chat.completions.create(
                model=BASE_ID, messages=asked(f"Count from {i}."), **GREEDY
            )
            return answer.choices[0].message.content

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert all(pool.map(ask, range(6)))
        impatient = client.with_options(max_retries=0)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            futures = [
                pool.submit(
                    impatient.chat.completions.create,
                    model=BASE_ID, messages=asked(f"Tell me of {i}."), max_tokens=200,
                )
                for i in range(6)
            ]  # fmt: skip
        refused = [future.exception() for future in futures if future.exception()]
        assert refused and all(isinstance(error, openai.RateLimitError) for error in refused)
