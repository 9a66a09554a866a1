"""Tools of a request: checked, offered to the model, and its calls read from what it writes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.datasets.conversation import tools_of
from edgelora.datasets.template import Template
from edgelora.engine.grammar import check_gbnf, json_schema_to_gbnf, schema_rules, text_to_gbnf
from edgelora.errors import InvalidGrammar, SchemaError
from edgelora.serve.call_format import CallFormat, find_call_format

MAX_CALLS = 16  # in one answer
_MAX_GRAMMAR_BYTES = 1_000_000
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made; `arguments` is JSON, cut off where the answer was."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """What a model wrote, as text and calls; `content` is None for calls alone."""

    content: str | None
    tool_calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class ToolPlan:
    """How one request's tools reach the model, and how its calls are recognised.

    Attributes:
        tools: for `Template.render_chat`; None where the template takes none, or there are none.
        grammar: GBNF for the answer; "" where no call may be made.
        instruction: what `messages` adds to the system turn for a template without tools.
    """

    tools: tuple[Mapping[str, Any], ...] | None
    grammar: str
    instruction: str
    format: CallFormat
    takes_tools: bool
    must_call: bool

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The conversation as the template can render it.

        For a template without tools: the instruction in the system turn, calls as JSON text,
        results as user turns. Everything stays text of the request, guarded as such.
        """
        if self.takes_tools:
            return list(messages)
        turns: list[Mapping[str, Any]] = []
        previous = ""
        for message in messages:
            turn = _without_tools(message)
            # Most templates without tools want user and assistant to take turns.
            if "tool" in (message["role"], previous) and turns and _are_users(turns[-1], turn):
                turn = {"role": "user", "content": f"{turns.pop()['content']}\n\n{turn['content']}"}
            turns.append(turn)
            previous = message["role"]
        return _instructed(turns, self.instruction)

    def is_call_so_far(self, text: str) -> bool | None:
        """Whether an answer that begins with `text` calls a tool; None while that is open."""
        if not self.grammar:
            return False
        if self.must_call:
            return True
        if self.format.marker:
            return True if self.format.marker in text else None
        begun, beginning = text.lstrip(" \t\n"), self.format.beginning
        if begun.startswith(beginning):
            return True
        return None if beginning.startswith(begun) else False

    def content_so_far(self, text: str) -> str:
        """How much of the answer's content is certain: what a stream may have sent by now.

        It only grows while `text` does, and `parse` of the whole begins with it.
        """
        called = self.is_call_so_far(text)
        if called is False:
            return text
        if not self.format.marker or self.must_call:
            return ""
        before, found, _ = text.partition(self.format.marker)
        if not found:
            sizes = range(min(len(self.format.marker) - 1, len(before)), 0, -1)
            held = next((n for n in sizes if before.endswith(self.format.marker[:n])), 0)
            before = before[: len(before) - held]
        return before.rstrip()

    def parse(self, text: str) -> Answer:
        """The finished text as content and calls, each with a new id.

        A call that was cut off within its arguments keeps what there is of them, as OpenAI's do;
        one that was cut off before is left as content.
        """
        if not self.is_call_so_far(text):
            return Answer(text, ())
        start = text.find(self.format.marker) if self.format.marker else 0
        calls = _calls_in(text, max(start, 0))
        if not calls:
            return Answer(text, ())
        content = text[: max(start, 0)].rstrip()
        return Answer(content or None, calls)


def plan_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    parallel_tool_calls: bool | None,
    *,
    template: Template,
) -> ToolPlan:
    """Check a request's tools in OpenAI's form, and plan how the model is to call them.

    With "auto" (the default) the model may write text, a call, or with a template that has a tag
    for calls, text and then calls. Without such a tag an answer that begins with "{" (or "[{"
    where the template lists calls) is a call. A function that is named is called exactly once, as
    OpenAI does.

    Raises:
        SchemaError: names each tool and what is wrong with it, or the choice.
    """
    named = _checked_tools(tools or ())
    chosen = _chosen(tool_choice, named)
    form = find_call_format(template)
    takes_tools = template.takes_tools
    if not chosen:
        return ToolPlan(None, "", "", form, takes_tools, False)
    must_call = tool_choice not in (None, "auto")
    one_call = parallel_tool_calls is False or isinstance(tool_choice, Mapping)
    n_more = 0 if one_call else MAX_CALLS - 1
    grammar = _grammar(chosen, form, must_call, n_more)
    listed = tuple(tools or ())
    instruction = "" if takes_tools else _instruction(listed, tool_choice, n_more)
    given = listed if takes_tools else None
    return ToolPlan(given, grammar, instruction, form, takes_tools, must_call)


def _checked_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The parameters' schema of each function by its name."""
    problems: list[str] = []
    named: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            problems.append(f"tools[{i}]: only tools of type 'function' with a 'function' object")
            continue
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(f"tools[{i}]: a name has 1 to 64 letters, digits, _ or -, not {name!r}")
            continue
        if name in named:
            problems.append(f"tools[{i}]: another function is named {name} too")
        if not isinstance(function.get("description"), str | None):
            problems.append(f"tools[{i}] {name}: its description is no text")
        parameters = function.get("parameters")
        named[name] = parameters = _NO_PARAMETERS if parameters is None else parameters
        if not isinstance(parameters, Mapping) or not _is_object(parameters):
            problems.append(f"tools[{i}] {name}: parameters are a schema of type 'object'")
            named[name] = _NO_PARAMETERS
        try:
            json_schema_to_gbnf(named[name])
        except SchemaError as error:
            said = error.problems or (error.what,)
            problems += [f"tools[{i}] {name}: {one}" for one in said]
    if problems:
        raise SchemaError("tools that cannot be offered", problems=problems)
    return named


def _is_object(schema: Mapping[str, Any]) -> bool:
    return schema.get("type", "object") == "object" and not {"enum", "const", "anyOf", "oneOf"} & {
        *schema
    }


def _chosen(
    choice: str | Mapping[str, Any] | None, named: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The functions that may be called."""
    if choice == "none" or (choice in (None, "auto") and not named):
        return {}
    if choice in (None, "auto", "required") and named:
        return dict(named)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if isinstance(choice, Mapping) and choice.get("type") == "function" and isinstance(name, str):
        if name in named:
            return {name: named[name]}
        known = ", ".join(named) or "none"
        raise SchemaError(f"tool_choice names {name!r}, which is not among the tools ({known})")
    if choice == "required":
        raise SchemaError("tool_choice is 'required', and there are no tools")
    raise SchemaError(
        f"tool_choice is {str(choice)[:80]!r}",
        hint="It is 'none', 'auto', 'required', or a function: "
        '{"type": "function", "function": {"name": "..."}}.',
    )


def _grammar(
    chosen: Mapping[str, Mapping[str, Any]], form: CallFormat, must_call: bool, n_more: int
) -> str:
    schemas = {f"tool-{i}": schema for i, schema in enumerate(chosen.values())}
    key = text_to_gbnf(f'"{form.key}"')
    rules = [schema_rules(schemas)]
    for i, name in enumerate(chosen):
        head = f'"{{" space "\\"name\\"" space ":" space {text_to_gbnf(json.dumps(name))}'
        rules.append(f'call-{i} ::= {head} space "," space {key} space ":" space tool-{i} "}}"')
    rules.append("call ::= " + " | ".join(f"call-{i}" for i in range(len(chosen))))
    tail = text_to_gbnf(form.opening.removeprefix(form.marker))
    more = f"({text_to_gbnf(form.between)} call){{0,{n_more}}}" if n_more else ""
    rules.append(f"calls ::= {tail} call {more} {text_to_gbnf(form.closing)}")
    if must_call:
        rules.append(f"root ::= {text_to_gbnf(form.marker)} calls")
    elif form.marker:
        rules += [*_text_until(form.marker), "root ::= text-0"]
    else:
        rules.append(rf"root ::= [ \t\n]* (calls | {_other_than(form.beginning)})?")
    grammar = "\n".join(rules)
    try:
        check_gbnf(grammar, _MAX_GRAMMAR_BYTES)
    except InvalidGrammar as error:
        raise SchemaError("the tools make a grammar that cannot be used: " + str(error)) from error
    return grammar


def _text_until(marker: str) -> list[str]:
    """Rules for any text in which `marker` comes at most once: then `calls` follow and end it.

    Rule `text-i` has seen the marker's first i characters (Knuth, Morris and Pratt's automaton),
    so that at every character there is one way to go on.
    """
    rules = []
    alphabet = sorted(set(marker))
    for i in range(len(marker)):
        targets: dict[int, str] = {}
        for character in alphabet:
            seen = marker[:i] + character
            n = next(n for n in range(len(seen), -1, -1) if seen.endswith(marker[:n]))
            targets[n] = targets.get(n, "") + character
        ways = [f"[^{_codes(alphabet)}] text-0"]
        for n, characters in targets.items():
            ways.append(f"[{_codes(characters)}] {'calls' if n == len(marker) else f'text-{n}'}")
        rules.append(f"text-{i} ::= ({' | '.join(ways)})?")
    return rules


def _other_than(beginning: str) -> str:
    """Any text, not empty, that begins otherwise (and with no space)."""
    first, rest = beginning[0], beginning[1:]
    return f"[^ \\t\\n{_codes(first)}] .*" + (
        f" | {text_to_gbnf(first)} ([^{_codes(rest[0])}] .*)?" if rest else ""
    )


def _codes(characters: Sequence[str]) -> str:
    return "".join(f"\\U{ord(character):08X}" for character in characters)


def _instruction(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None, n_more: int
) -> str:
    listed = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools_of(tools) or ()]
    if isinstance(choice, Mapping):
        must = f"Call the function {choice['function']['name']}."
    elif choice == "required":
        must = "Call a function."
    else:
        must = "Call a function if it helps, otherwise answer in words."
    lines = [
        "You can call these functions, each given with a JSON schema of its parameters:",
        *listed,
        f"{must} A call is nothing but a JSON object of this form:",
        '{"name": "the function", "arguments": {...}}',
    ]
    if n_more:
        lines.append("Several calls follow each other, one on a line.")
    return "\n".join(lines)


def _are_users(*turns: Mapping[str, Any]) -> bool:
    return all(turn["role"] == "user" for turn in turns)


def _without_tools(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        of = f" of {message['name']}" if message.get("name") else ""
        return {"role": "user", "content": f"Result{of}:\n{content}"}
    if not message.get("tool_calls"):
        return {key: value for key, value in message.items() if key != "tool_calls"}
    calls = [call["function"] for call in message["tool_calls"]]
    texts = [_call_text(call["name"], call.get("arguments") or "{}") for call in calls]
    return {"role": message["role"], "content": "\n".join([content] * bool(content) + texts)}


def _call_text(name: str, arguments: str | Mapping[str, Any]) -> str:
    # Arguments as text are written as they are: the model wrote them so.
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {text}}}'


def _instructed(turns: list[Mapping[str, Any]], instruction: str) -> list[Mapping[str, Any]]:
    if not instruction:
        return turns
    if turns and turns[0]["role"] in ("system", "developer"):
        content = "\n\n".join(filter(None, [turns[0].get("content"), instruction]))
        return [{**turns[0], "content": content}, *turns[1:]]
    return [{"role": "system", "content": instruction}, *turns]


def _calls_in(text: str, start: int) -> tuple[ToolCall, ...]:
    calls = []
    decoder = json.JSONDecoder(strict=False)
    while head := _HEAD.search(text, start):
        try:
            _, end = decoder.raw_decode(text, head.end())
        except (ValueError, RecursionError):
            end = len(text)
        calls.append(
            ToolCall(f"call_{secrets.token_hex(12)}", head[1], text[head.end() : end].rstrip())
        )
        start = end
    return tuple(calls)
