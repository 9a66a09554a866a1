"""OpenAI's messages and tools as chat templates read them; every text of a request in one place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.datasets.records import ROLES, Message
from edgelora.errors import TemplateError

# A turn as a template reads it: role, content, and what belongs to calls of tools.
Turn = Mapping[str, Any]

PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "edgelora_probe",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "description": "A text."}},
            "required": ["text"],
        },
    },
}
_FUNCTION_KEYS = ("name", "description", "parameters")


def turn_of(message: Message) -> Turn:
    """A plain message as a turn."""
    return {"role": message.role, "content": message.content}


def turns_of(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Turns from OpenAI's messages: arguments parsed, a developer's message as the system's.

    A tool's message gets the name of the function whose call it answers.

    Raises:
        TemplateError: unknown roles, or a call whose arguments are not a JSON object.
    """
    unknown = sorted({str(m.get("role")) for m in messages} - {*ROLES, "developer", "tool"})
    if unknown or not messages:
        raise TemplateError(f"unknown roles {unknown}" if unknown else "no messages to render")
    names: dict[str, str] = {}
    turns: list[Turn] = []
    for message in messages:
        turn = _turn(message)
        names |= {call["id"]: call["function"]["name"] for call in turn.get("tool_calls", ())}
        if turn["role"] == "tool" and "name" not in turn and turn.get("tool_call_id") in names:
            turn["name"] = names[turn["tool_call_id"]]
        turns.append(turn)
    return turns


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]
    # Templates add to the content: of a turn of calls alone it is empty, not None.
    turn: dict[str, Any] = {"role": role, "content": message.get("content") or ""}
    turn |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if message.get("tool_calls"):
        turn["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return turn


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise TemplateError(f"the arguments of the call to {function['name']} are no JSON object")
    called = {"name": function["name"], "arguments": arguments}
    return {"id": str(call.get("id") or ""), "type": "function", "function": called}


def tools_of(tools: Sequence[Mapping[str, Any]] | None) -> list[Turn] | None:
    """OpenAI's tools with what a template may write of them; None for none."""
    return [
        {
            "type": "function",
            "function": {k: v for k, v in tool["function"].items() if k in _FUNCTION_KEYS},
        }
        for tool in tools or ()
    ] or None


def change_turn(turn: Turn, change: Callable[[str], str]) -> Turn:
    """A turn with all that was typed changed; its role and its own keys are not typed."""
    changed = {k: v if k == "role" else change_texts(v, change) for k, v in turn.items()}
    if "tool_calls" in turn:
        changed["tool_calls"] = [
            {"id": change(call["id"]), **_change_function(call, change)}
            for call in turn["tool_calls"]
        ]
    return changed


def change_tools(tools: Sequence[Turn] | None, change: Callable[[str], str]) -> list[Turn] | None:
    """Tools with all that was typed changed: names, descriptions, and keys of schemas too."""
    return None if tools is None else [_change_function(tool, change) for tool in tools]


def _change_function(value: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    function = {key: change_texts(inner, change) for key, inner in value["function"].items()}
    return {"type": "function", "function": function}


def change_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(k)): change_texts(inner, change) for k, inner in value.items()}
    if isinstance(value, list | tuple):
        return [change_texts(inner, change) for inner in value]
    return value


def texts_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def with_short_ids(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with ids of nine digits: Mistral's templates refuse all others."""
    numbers: dict[str, str] = {}

    def short(call: str) -> str:
        return numbers.setdefault(call, f"{len(numbers):09d}")

    shortened: list[Turn] = []
    for turn in turns:
        changed = dict(turn)
        if "tool_calls" in turn:
            calls = turn["tool_calls"]
            changed["tool_calls"] = [{**call, "id": short(call["id"])} for call in calls]
        if "tool_call_id" in turn:
            changed["tool_call_id"] = short(turn["tool_call_id"])
        shortened.append(changed)
    return shortened
