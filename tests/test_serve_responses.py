"""POST /v1/responses over real HTTP: objects, events in their order, refusals, openai's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pico
import pydantic
import pytest
from alone import Alone, alone
from openai.types.responses import Response, ResponseStreamEvent
from serving import Running, running

PATH = "/v1/responses"
TEXT = "the cat and the hat"


@dataclass
class Setup:
    running: Running
    http: httpx.Client
    alone: Alone

    def post(self, **body: Any) -> dict[str, Any]:
        answer = self.http.post(PATH, json={"input": TEXT, "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def events(self, **body: Any) -> list[dict[str, Any]]:
        full = {"input": TEXT, "temperature": 0, "stream": True, **body}
        answer = self.http.post(PATH, json=full)
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        *events, end = answer.text.split("\n\n")
        assert end == ""
        parsed = []
        for event in events:
            name, data = event.split("\n")
            parsed.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {parsed[-1]['type']}"
        assert [event["sequence_number"] for event in parsed] == list(range(len(parsed)))
        return parsed

    def answer(self, n: int, *turns: tuple[str, str]) -> str:
        return self.alone.answer(self.alone.prompt(*turns), n)


def text_of(response: dict[str, Any]) -> str:
    (item,) = response["output"]
    (part,) = item["content"]
    return str(part["text"])


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("responses")
    base = pico.write_base(folder / "base.gguf", tied=False, dims=pico.Dims(n_ctx=1024))
    with (
        running(base, n_ctx=1024) as server,
        alone(base) as reference,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield Setup(server, http, reference)


def test_a_text_is_one_user_turn(setup: Setup) -> None:
    response = setup.post(max_output_tokens=8)
    assert response["object"] == "response" and response["id"].startswith("resp_")
    assert response["model"] == "base" and response["store"] is False
    assert text_of(response) == setup.answer(8, ("user", TEXT))
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    usage = response["usage"]
    n = len(setup.alone.prompt(("user", TEXT)))
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (n, 8, n + 8)
    ended = setup.post(grammar='root ::= "he was"')
    assert text_of(ended) == "he was" and ended["status"] == "completed"
    assert ended["incomplete_details"] is None and ended["output"][0]["status"] == "completed"


def test_objects_and_events_are_openai_s(setup: Setup) -> None:
    called = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    for body in ({"max_output_tokens": 3}, called):
        Response.model_validate(setup.post(**body))
        for event in setup.events(**body):
            pydantic.TypeAdapter(ResponseStreamEvent).validate_python(event)


def test_instructions_and_messages(setup: Setup) -> None:
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": TEXT}]},
        {
            "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
            "content": [{"type": "output_text", "text": "is it", "annotations": []}],
        },
        {"role": "user", "content": "he was"},
    ]  # fmt: skip
    response = setup.post(input=turns, instructions="be he", max_output_tokens=6)
    expected = setup.answer(
        6, ("system", "be he"), ("user", TEXT), ("assistant", "is it"), ("user", "he was")
    )
    assert text_of(response) == expected
    assert response["instructions"] == "be he"


def test_events_in_their_order(setup: Setup) -> None:
    events = setup.events(max_output_tokens=5)
    names = [event["type"].removeprefix("response.") for event in events]
    n_deltas = names.count("output_text.delta")
    assert n_deltas >= 1
    assert names == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * n_deltas,
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    text = setup.answer(5, ("user", TEXT))
    assert "".join(e["delta"] for e in events if e["type"].endswith("text.delta")) == text
    assert events[0]["response"]["status"] == "in_progress" and events[2]["item"]["content"] == []
    assert events[-4]["text"] == events[-3]["part"]["text"] == text
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert events[-1]["response"]["usage"]["output_tokens"] == 5
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    ended = setup.events(grammar='root ::= "he"')
    assert ended[-1]["type"] == "response.completed"


def test_a_schema_is_followed(setup: Setup) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    format = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    response = setup.post(text={"format": format}, max_output_tokens=60)
    assert isinstance(json.loads(text_of(response))["a"], bool)
    assert response["text"]["format"] == format
    bad = {**format, "schema": {"type": "object", "minProperties": 2}}
    error = setup.http.post(PATH, json={"input": TEXT, "text": {"format": bad}}).json()["error"]
    assert error["param"] == "text.format.schema" and "minProperties" in error["message"]


def test_log_probabilities_are_included(setup: Setup) -> None:
    plain = setup.post(max_output_tokens=4)
    assert plain["output"][0]["content"][0]["logprobs"] == []
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = setup.post(max_output_tokens=4, **asked)["output"][0]["content"][0]
    assert len(part["logprobs"]) == 4
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    events = setup.events(max_output_tokens=4, **asked)
    streamed = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    done = events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in done] == [entry["token"] for entry in part["logprobs"]]
    assert [entry for entries in streamed for entry in entries] == done[: sum(map(len, streamed))]


TOOL = {
    "type": "function",
    "name": "look",
    "description": "Looks.",
    "parameters": {
        "type": "object",
        "properties": {"far": {"type": "boolean"}},
        "required": ["far"],
        "additionalProperties": False,
    },
}


def test_a_function_is_called_and_its_result_read(setup: Setup) -> None:
    body = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    response = setup.post(**body)
    (call,) = response["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "look", "completed")
    assert isinstance(json.loads(call["arguments"])["far"], bool)
    assert response["tools"][0]["name"] == "look" and response["tool_choice"] == "required"
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "a cat"}
    after = setup.post(
        input=[{"role": "user", "content": TEXT}, call, result], tools=[TOOL], max_output_tokens=3
    )
    assert after["usage"]["input_tokens"] > response["usage"]["input_tokens"]


def test_the_events_of_a_call(setup: Setup) -> None:
    events = setup.events(
        tools=[TOOL], tool_choice={"type": "function", "name": "look"}, parallel_tool_calls=False
    )
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:3] == ["created", "in_progress", "output_item.added"]
    deltas = [e["delta"] for e in events if e["type"].endswith("arguments.delta")]
    assert names[3:] == [
        *["function_call_arguments.delta"] * len(deltas),
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert len(deltas) > 1
    (call,) = events[-1]["response"]["output"]
    assert "".join(deltas) == call["arguments"] == events[-3]["arguments"]
    assert isinstance(json.loads(call["arguments"])["far"], bool)
    assert events[2]["item"]["call_id"] == call["call_id"]


def test_the_openai_client(setup: Setup) -> None:
    with openai.OpenAI(base_url=f"{setup.running.url}/v1", api_key="x", max_retries=0) as client:
        response = client.responses.create(
            model="base", input=TEXT, max_output_tokens=6, temperature=0
        )
        expected = setup.answer(6, ("user", TEXT))
        assert response.output_text == expected
        assert response.usage is not None and response.usage.output_tokens == 6
        with client.responses.stream(
            model="base", input=TEXT, temperature=0, extra_body={"grammar": 'root ::= "it is"'}
        ) as stream:
            deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
            assert "".join(deltas) == "it is" == stream.get_final_response().output_text
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="base", input=TEXT, max_output_tokens=4000)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
        ),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_object"}}, "grammar": 'root ::= "a"'}, "grammar"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
    ],
)
def test_what_is_refused_names_its_field(setup: Setup, body: dict[str, Any], param: str) -> None:
    answer = setup.http.post(PATH, json={"input": TEXT, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_stream_that_fails_says_so(setup: Setup) -> None:
    """Last, for the engine is stopped under the stream."""
    body = {"input": TEXT, "stream": True, "ignore_eos": True, "temperature": 1}
    with setup.http.stream("POST", PATH, json=body) as stream:
        chunks = stream.iter_text()
        text = next(chunks)
        setup.running.server.scheduler.stop()
        text += "".join(chunks)
    last = json.loads(text.split("\n\n")[-2].split("\n")[1].removeprefix("data: "))
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["message"]
