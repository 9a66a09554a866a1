"""Tools in chat completions over real HTTP: whole and streamed, with two kinds of template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pico
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import running

from edgelora.serve.assistant import AssistantTurn, Called, Said, finish_reason
from edgelora.serve.call_format import CallFormat
from edgelora.serve.tools import ToolPlan

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "the cat and the hat"}
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% if m['tool_calls'] %}{% for c in m['tool_calls'] %}<tool_call>\n"
    '{"name": "{{ c["function"]["name"] }}", "arguments": '
    '{{ c["function"]["arguments"] | tojson }}}'
    "\n</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def function(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


LOOK = function("look", far={"type": "boolean"})
GO = function("go", where={"enum": ["in", "out"]})


@pytest.fixture(scope="module", params=["without tools", "with tools"])
def http(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    template = {"without tools": pico.CHATML, "with tools": TEMPLATE}[request.param]
    path = tmp_path_factory.mktemp("tools") / "base.gguf"
    base = pico.write_base(path, tied=False, chat_template=template, dims=pico.Dims(n_ctx=2048))
    with (
        running(base, n_ctx=2048) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post(PATH, json={"messages": [USER], "temperature": 0, "max_tokens": 300, **body})
    assert answer.status_code == 200, answer.text
    ChatCompletion.model_validate(answer.json())
    return dict(answer.json())


def chunks(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    full = {"messages": [USER], "temperature": 0, "max_tokens": 300, "stream": True, **body}
    *events, done, end = http.post(PATH, json=full).text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    parsed = [json.loads(event[6:]) for event in events]
    for chunk in parsed:
        ChatCompletionChunk.model_validate(chunk)
    return parsed


def is_sound(call: dict[str, Any]) -> bool:
    arguments = json.loads(call["function"]["arguments"])
    assert call["type"] == "function" and call["id"].startswith("call_")
    if call["function"]["name"] == "look":
        return set(arguments) == {"far"} and isinstance(arguments["far"], bool)
    return call["function"]["name"] == "go" and arguments["where"] in ("in", "out")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"look", "go"}),
        ({"type": "function", "function": {"name": "go"}}, {"go"}),
    ],
)
def test_a_call_that_is_required(http: httpx.Client, choice: Any, names: set[str]) -> None:
    body = {"tools": [LOOK, GO], "tool_choice": choice, "parallel_tool_calls": False}
    for seed in range(3):
        (whole,) = post(http, **body, seed=seed, temperature=1.3)["choices"]
        assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
        (call,) = whole["message"]["tool_calls"]
        assert is_sound(call) and call["function"]["name"] in names
        streamed = [c["choices"][0] for c in chunks(http, **body, seed=seed, temperature=1.3)]
        assert streamed[-1]["finish_reason"] == "tool_calls"
        assert all(part["delta"].get("content", "") == "" for part in streamed)
        deltas = [d for part in streamed for d in part["delta"].get("tool_calls", [])]
        assert {delta["index"] for delta in deltas} == {0}
        assert deltas[0]["id"].startswith("call_") and deltas[0]["type"] == "function"
        assert deltas[0]["function"]["name"] == call["function"]["name"]
        assert all(set(delta) == {"index", "function"} for delta in deltas[1:])
        arguments = "".join(delta["function"]["arguments"] for delta in deltas)
        assert arguments == call["function"]["arguments"]


def test_calls_in_parallel_are_numbered(http: httpx.Client) -> None:
    body = {"tools": [LOOK, GO], "tool_choice": "required", "temperature": 2}
    counts = set()
    for seed in range(4):
        (whole,) = post(http, **body, seed=seed)["choices"]
        calls = whole["message"]["tool_calls"]
        counts.add(len(calls))
        if whole["finish_reason"] == "tool_calls":
            assert all(map(is_sound, calls))
            assert len({call["id"] for call in calls}) == len(calls)
        parts = [c["choices"][0]["delta"] for c in chunks(http, **body, seed=seed)]
        deltas = [delta for part in parts for delta in part.get("tool_calls", [])]
        joined = ["" for _ in calls]
        for delta in deltas:
            joined[delta["index"]] += delta["function"]["arguments"]
        assert joined == [call["function"]["arguments"] for call in calls]
    assert max(counts) > 1


def test_a_call_that_is_cut_off(http: httpx.Client) -> None:
    body = {"tools": [LOOK], "tool_choice": "required"}
    (whole,) = post(http, **body)["choices"]
    n_tokens = post(http, **body)["usage"]["completion_tokens"]
    assert whole["finish_reason"] in ("tool_calls", "length")
    (cut,) = post(http, **body, max_tokens=min(n_tokens, 40) - 12)["choices"]
    assert cut["finish_reason"] == "length"


def test_auto_leaves_the_choice_to_the_model(http: httpx.Client) -> None:
    reasons = set()
    for seed in range(4):
        body = {"tools": [LOOK], "seed": seed, "temperature": 1, "max_tokens": 60}
        (whole,) = post(http, **body)["choices"]
        reasons.add(whole["finish_reason"])
        parts = [c["choices"][0] for c in chunks(http, **body)]
        content = "".join(part["delta"].get("content") or "" for part in parts)
        assert content == (whole["message"]["content"] or "")
        assert parts[-1]["finish_reason"] == whole["finish_reason"]
    assert "length" in reasons


def test_none_offers_nothing(http: httpx.Client) -> None:
    plain = post(http, max_tokens=8)
    for body in ({"tools": [LOOK], "tool_choice": "none"}, {"tools": []}, {"tool_choice": "auto"}):
        answer = post(http, max_tokens=8, **body)
        assert answer["choices"] == plain["choices"]
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    formatted = {"type": "json_object", "schema": {"type": "boolean"}}
    body = {"tools": [LOOK], "tool_choice": "none", "response_format": formatted}
    assert post(http, **body)["choices"][0]["message"]["content"].strip() in ("true", "false")


def test_the_result_of_a_call_is_part_of_the_conversation(http: httpx.Client) -> None:
    (asked,) = post(http, tools=[LOOK], tool_choice="required", parallel_tool_calls=False)[
        "choices"
    ]
    (call,) = asked["message"]["tool_calls"]
    turns = [USER, asked["message"], {"role": "tool", "tool_call_id": call["id"], "content": "in"}]
    answer = post(http, messages=turns, tools=[LOOK], max_tokens=4)
    shorter = post(http, messages=turns[:2], tools=[LOOK], max_tokens=4)
    assert answer["usage"]["prompt_tokens"] > shorter["usage"]["prompt_tokens"]


def test_the_openai_client(http: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="x", max_retries=0) as client:
        messages: Any = [USER]
        tools: Any = [LOOK]
        with client.chat.completions.stream(
            model="base", messages=messages, tools=tools, tool_choice="required",
            parallel_tool_calls=False, temperature=0,
        ) as stream:  # fmt: skip
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls" and final.message.tool_calls
        assert final.message.tool_calls[0].function.name == "look"
        assert isinstance(json.loads(final.message.tool_calls[0].function.arguments)["far"], bool)


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0]"),
        ({"tools": [function("bad name")]}, "tools", "bad name"),
        ({"tools": [LOOK, LOOK]}, "tools", "look"),
        ({"tools": [function("f", a={"type": "string", "pattern": "(?=a)"})]}, "tools", "pattern"),
        ({"tools": [function("f", a={"multipleOf": 3})]}, "tools", "multipleOf"),
        ({"tools": [function(f"f{i}") for i in range(129)]}, "tools", "128"),
        ({"tools": [5]}, "tools[0]", "dictionary"),
        ({"tools": [LOOK], "tool_choice": "perhaps"}, "tool_choice", "perhaps"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        (
            {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "go"}}},
            "tool_choice",
            "look",
        ),
        ({"tools": [LOOK], "grammar": 'root ::= "a"'}, "grammar", "tool"),
        (
            {"tools": [LOOK], "response_format": {"type": "json_object"}},
            "response_format",
            "tool",
        ),
    ],
)
def test_what_is_refused_is_named(
    http: httpx.Client, body: dict[str, Any], param: str, named: str
) -> None:
    answer = http.post(PATH, json={"messages": [USER], **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and named in error["message"]


TAGGED = ToolPlan(None, "root", "", CallFormat("<tool_call>", "<tool_call>\n"), True, False)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_text_and_then_calls_piece_by_piece(size: int) -> None:
    text = (
        'it is <tool\n<tool_call>\n{"name": "a", "arguments": {"x": "y \\" }"}}\n'
        '{"name": "b", "arguments": {}}\n</tool_call>'
    )
    turn = AssistantTurn(TAGGED)
    parts = [p for i in range(0, len(text), size) for p in turn.add(text[i : i + size])]
    parts += turn.end()
    said = [part.text for part in parts if isinstance(part, Said)]
    assert "".join(said) == "it is <tool" and "" not in said
    called = [part for part in parts if isinstance(part, Called)]
    assert [(c.index, c.name) for c in called if c.id] == [(0, "a"), (1, "b")]
    arguments = ["".join(c.arguments for c in called if c.index == i) for i in range(2)]
    assert arguments == ['{"x": "y \\" }"}', "{}"]
    assert finish_reason("stop", turn.n_calls) == "tool_calls"
    assert finish_reason("length", turn.n_calls) == "length"


def test_a_tag_without_a_call_is_content() -> None:
    turn = AssistantTurn(TAGGED)
    parts = [*turn.add("so: <tool_call>\n{"), *turn.end()]
    assert "".join(part.text for part in parts if isinstance(part, Said)) == "so: <tool_call>\n{"
    assert turn.n_calls == 0 and finish_reason("stop", 0) == "stop"
