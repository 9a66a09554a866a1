"""Tools: checked, called by a real sampler through the plan's grammar, and read back."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from chat_templates import LLAMA31, MISTRAL_TOKENS, MISTRAL_V3, QWEN
from test_grammar import Drawing, drawing  # noqa: F401
from test_template import MISTRAL

from edgelora.datasets.template import Template, open_template
from edgelora.engine.grammar import check_gbnf
from edgelora.errors import SchemaError
from edgelora.serve.call_format import CallFormat, find_call_format
from edgelora.serve.tools import ToolPlan, plan_tools

TEMPLATES: dict[str, Template] = {
    "tagged": open_template(QWEN, None, "", "", ["<|im_start|>", "<|im_end|>"]),
    "alone": open_template(LLAMA31, None, "", "", ["<|eot_id|>"]),
    "listed": open_template(MISTRAL_V3, None, "<s>", "</s>", MISTRAL_TOKENS),
    "none": open_template(None, "chatml", "", "", ["<|im_start|>", "<|im_end|>"]),
}
SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 5},
            "unit": {"$ref": "#/$defs/unit"},
        },
        "required": ["city", "unit"],
        "$defs": {"unit": {"enum": ["C", "F"]}},
    },
    "now-1": None,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMAS["get_weather"]}},
    {"type": "function", "function": {"name": "now-1", "description": "The time."}},
]
NAMED = {"type": "function", "function": {"name": "now-1"}}


def plan(name: str, choice: Any = None, parallel: bool | None = None) -> ToolPlan:
    return plan_tools(TOOLS, choice, parallel, template=TEMPLATES[name])


def test_formats_of_templates() -> None:
    assert find_call_format(TEMPLATES["tagged"]) == CallFormat(
        "<tool_call>",
        "<tool_call>\n",
        "\n</tool_call>\n<tool_call>\n",
        "\n</tool_call>",
        "arguments",
    )
    assert find_call_format(TEMPLATES["alone"]) == CallFormat(key="parameters")
    assert find_call_format(TEMPLATES["listed"]) == CallFormat("", "[", ", ", "]", "arguments")
    assert find_call_format(TEMPLATES["none"]) == CallFormat()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("choice", ["required", NAMED, "auto", None])
def test_drawn_answers_are_calls_of_the_tools_or_text(
    name: str,
    choice: Any,
    drawing: Drawing,  # noqa: F811
) -> None:
    made = plan(name, choice, parallel=name != "alone")
    check_gbnf(made.grammar, 1_000_000)
    calls_only = choice not in ("auto", None)
    likely = {"likely": '"}]<{', "end": 0 if calls_only else 5}
    texts = [drawing.draw(made.grammar, seed, 400, **likely) for seed in range(6)]
    answers = [made.parse(text) for text in texts if text is not None]
    assert answers
    for answer in answers:
        assert answer.tool_calls or not calls_only
        assert name != "alone" or len(answer.tool_calls) <= 1
        for call in answer.tool_calls:
            assert call.name in (["now-1"] if choice is NAMED else list(SCHEMAS))
            arguments = json.loads(call.arguments)
            jsonschema.validate(arguments, SCHEMAS[call.name] or {"maxProperties": 0})
            assert call.id.startswith("call_")
        ids = [call.id for call in answer.tool_calls]
        assert len(set(ids)) == len(ids)


# name: (template, answer, content, [(function, arguments)])
ANSWERS: dict[str, tuple[str, str, str | None, list[tuple[str, str]]]] = {
    "text": ("tagged", "Hello < world <tool", "Hello < world <tool", []),
    "a call": (
        "tagged",
        '<tool_call>\n{"name": "now-1", "arguments": {}}\n</tool_call>',
        None,
        [("now-1", "{}")],
    ),
    "text, then calls": (
        "tagged",
        'I look.\n<tool_call>\n{"name": "now-1", "arguments": {}}\n</tool_call>\n<tool_call>\n'
        '{"name": "get_weather", "arguments": {"city": "}{\\"", "unit": "C"}}\n</tool_call>',
        "I look.",
        [("now-1", "{}"), ("get_weather", '{"city": "}{\\"", "unit": "C"}')],
    ),
    "cut in its arguments": (
        "tagged",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Kö',
        None,
        [("get_weather", '{"city": "Kö')],
    ),
    "cut before them": ("tagged", 'So <tool_call>\n{"na', 'So <tool_call>\n{"na', []),
    "plain JSON": (
        "none",
        '{"name": "now-1", "arguments": {}}\n{"name": "now-1", "arguments": {}}',
        None,
        [("now-1", "{}"), ("now-1", "{}")],
    ),
    "parameters": ("alone", '{"name": "now-1", "parameters": {}}', None, [("now-1", "{}")]),
    "a list": ("listed", '[{"name": "now-1", "arguments": {}}]', None, [("now-1", "{}")]),
    "no list of calls": ("listed", "[1] and [2]", "[1] and [2]", []),
    "a brace later": ("none", 'Say {"name": "x", "arguments": {}}', "Say " + "{", []),
}
ANSWERS["a brace later"] = ("none", ANSWERS["a brace later"][1], ANSWERS["a brace later"][1], [])


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_read_back_whole_and_streamed(name: str) -> None:
    template, text, content, calls = ANSWERS[name]
    made = plan(template)
    answer = made.parse(text)
    assert answer.content == content
    assert [(call.name, call.arguments) for call in answer.tool_calls] == calls
    streamed = [made.content_so_far(text[:n]) for n in range(len(text) + 1)]
    for earlier, later in zip(streamed, [*streamed[1:], answer.content or ""], strict=True):
        assert later.startswith(earlier)
    begun = [made.is_call_so_far(text[:n]) for n in range(len(text) + 1)]
    if calls:
        assert begun[0] is None and begun[-1] is True
        assert all(
            later is True for earlier, later in zip(begun, begun[1:], strict=False) if earlier
        )


@pytest.mark.parametrize("name", ANSWERS)
def test_the_grammar_allows_those_answers(name: str, drawing: Drawing) -> None:  # noqa: F811
    template, text, *_ = ANSWERS[name]
    assert drawing.accepts(plan(template).grammar, text) == (not name.startswith("cut"))
    one = plan(template, parallel=False).grammar
    several = len(ANSWERS[name][3]) > 1
    assert drawing.accepts(one, text) == (not name.startswith("cut") and not several)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_function_that_is_named_is_called_once(name: str, drawing: Drawing) -> None:  # noqa: F811
    form = find_call_format(TEMPLATES[name])
    call = f'{{"name": "now-1", "{form.key}": {{}}}}'
    one, two = (
        form.opening + form.between.join([call] * n_calls) + form.closing for n_calls in (1, 2)
    )
    assert drawing.accepts(plan(name, NAMED).grammar, one)
    assert drawing.accepts(plan(name, "required").grammar, two)
    assert not drawing.accepts(plan(name, NAMED).grammar, two)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("tagged", '<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>'),
        ("tagged", '<tool_call>\n{"name": "now-1", "arguments": {"a": 1}}\n</tool_call>'),
        ("tagged", 'I see <<tool_call>\n{"name": "now-1", "arguments": {}}'),
        ("tagged", '<tool_call>\n{"name": "now-1", "arguments": {}}\n</tool_call> and text'),
        ("none", '{"name": "get_weather", "arguments": {"city": "toolong", "unit": "C"}}'),
        ("none", ' {"a": 1}'),
        ("listed", '[{"a": 1}]'),
    ],
)
def test_the_grammar_allows_no_wrong_call(
    template: str,
    text: str,
    drawing: Drawing,  # noqa: F811
) -> None:
    assert not drawing.accepts(plan(template).grammar, text)


def test_where_no_call_may_be_made_everything_is_text() -> None:
    call = '{"name": "now-1", "arguments": {}}'
    for made in (plan("none", "none"), plan_tools(None, None, None, template=TEMPLATES["none"])):
        assert (made.grammar, made.instruction, made.tools) == ("", "", None)
        assert made.parse(call).content == call == made.content_so_far(call)
        assert made.is_call_so_far(call) is False
    assert plan("tagged").tools == tuple(TOOLS) and plan("tagged").instruction == ""


def test_a_conversation_for_a_template_without_tools() -> None:
    made = plan("none", "required")
    called = {"id": "c1", "function": {"name": "now-1", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [called, called]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00", "name": "now-1"},
        {"role": "tool", "tool_call_id": "c1", "content": "12:01"},
        {"role": "user", "content": "Thanks"},
    ]
    first, *rest = made.messages(turns)
    assert first == {"role": "system", "content": made.instruction}
    assert '{"name": "now-1", "description": "The time."}' in made.instruction
    assert "Call a function." in made.instruction
    one = '{"name": "now-1", "arguments": {}}'
    assert rest == [
        turns[0],
        {"role": "assistant", "content": f"Hm.\n{one}\n{one}"},
        {"role": "user", "content": "Result of now-1:\n12:00\n\nResult:\n12:01\n\nThanks"},
    ]
    # With a system turn the instruction joins it, and Mistral's template can render the whole.
    system = [{"role": "system", "content": "Be brief."}, *turns]
    assert made.messages(system)[0]["content"] == f"Be brief.\n\n{made.instruction}"
    template = open_template(MISTRAL, None, "<s>", "</s>", ["[INST]", "[/INST]"])
    assert template.render_chat(made.messages(system))
    assert plan("tagged").messages(turns) == turns


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        ({"type": "retrieval"}, r"tools\[0\]: only tools of type 'function'"),
        ({"type": "function", "function": {"name": "a b"}}, "not 'a b'"),
        ({"type": "function", "function": {"name": "x" * 65}}, "1 to 64 letters"),
        ({"type": "function", "function": {}}, "not None"),
        ({"type": "function", "function": {"name": "f", "description": 3}}, "f: its description"),
        (
            {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}},
            r"tools\[0\] f: parameters are a schema of type 'object'",
        ),
        (
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"properties": {"a": {"minimum": 1}}}},
            },
            r"tools\[0\] f: #/properties/a/minimum",
        ),
    ],
)
def test_tools_that_cannot_be_offered(tool: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        plan_tools([tool], None, None, template=TEMPLATES["none"])


def test_every_problem_of_the_tools_is_told_at_once() -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"not": {}, "if": {}}}}
    with pytest.raises(SchemaError) as caught:
        plan_tools([bad, bad, {}], None, None, template=TEMPLATES["none"])
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        (TOOLS, {"type": "function", "function": {"name": "fly"}}, "'fly'.*get_weather, now-1"),
        (TOOLS, "always", "tool_choice is 'always'"),
        (TOOLS, {"type": "function"}, "tool_choice is"),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice is"),
        ([], "required", "no tools"),
        ([], NAMED, "not among the tools"),
    ],
)
def test_choices_that_cannot_be_made(tools: list[Any], choice: Any, said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        plan_tools(tools, choice, None, template=TEMPLATES["none"])
