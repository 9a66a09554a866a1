"""One record of a file to one Example: the layouts of columns that EdgeLoRA recognises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgelora.datasets.records import ROLES, Example, Message
from edgelora.errors import DatasetError

Record = Mapping[str, object]

# Recognised by their columns, first match wins: (needed columns, layout).
_COMPLETION_KEYS = ("completion", "output")


class BadRecord(ValueError):
    """One record that cannot become an example; the message says why, without its place."""


@dataclass(frozen=True)
class Layout:
    """Which columns hold the prompt (`prompt`, and `context` below it) and the answer."""

    name: str
    prompt: str
    completion: str | None
    context: str | None = None


_LAYOUTS = (
    (("messages",), Layout("messages (chat)", "messages", None)),
    (("prompt",), Layout("prompt/completion", "prompt", "completion")),
    (("instruction",), Layout("instruction/input/output", "instruction", "output", "input")),
    (("input", "output"), Layout("input/output", "input", "output")),
    (("text",), Layout("text", "text", None)),
)


def find_layout(
    columns: Iterable[str], prompt_key: str | None = None, completion_key: str | None = None
) -> Layout:
    """The layout of records with these `columns`; the keys given by the user come first.

    Raises:
        DatasetError: no layout fits, or a key that was asked for is not there.
    """
    names = [name for name in columns if name is not None]
    _refuse_missing(names, prompt_key, completion_key)
    if prompt_key is not None:
        answer = completion_key or _default_completion(names, prompt_key)
        return Layout(f"{prompt_key}/{answer}" if answer else prompt_key, prompt_key, answer)
    for needed, layout in _LAYOUTS:
        if all(name in names for name in needed):
            return _with_completion(layout, completion_key)
    raise DatasetError(
        f"no known layout has the columns {_listed(names)}",
        hint="Known: prompt/completion, instruction/input/output, input/output, messages, text. "
        "Or name the columns with --prompt-key and --completion-key.",
    )


def to_example(record: Record, layout: Layout, line: int) -> Example:
    """One record read by `layout`.

    Raises:
        BadRecord: a missing, empty or non-text field, or turns that are not a conversation.
    """
    if layout.prompt == "messages" and layout.name.startswith("messages"):
        return _chat_example(record, layout, line)
    prompt = _text(record, layout.prompt)
    if layout.context is not None and not _absent(record.get(layout.context)):
        prompt = f"{prompt}\n\n{_text(record, layout.context)}"
    answers = _answers(record, layout.completion)
    return _example((Message("user", prompt),), answers, record, line)


def instances_of(task: Record) -> list[dict[str, object]]:
    """A Super-NaturalInstructions task file as prompt/completion records.

    The prompt is the definition, a blank line, and the instance's input, which suits a chat
    template; the named raw template "sni" takes the two apart again at the first blank line.
    The first output is the completion and all outputs are the references.

    Raises:
        DatasetError: the definition or the instances do not have the shape of such a file.
    """
    definition, instances = task.get("Definition"), task.get("Instances")
    parts = definition if isinstance(definition, list) else [definition]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) != len(parts) or not isinstance(instances, list):
        raise DatasetError("a task file needs Definition (text) and Instances (a list)")
    head = "\n".join(texts).strip()
    return [_instance(head, instance) for instance in instances]


def _instance(definition: str, instance: object) -> dict[str, object]:
    if not isinstance(instance, dict):
        return {"prompt": instance}
    text = instance.get("input")
    if not isinstance(text, str) or not definition:
        return {"prompt": text, "completion": instance.get("output")}
    return {"prompt": f"{definition}\n\n{text}", "completion": instance.get("output")}


def _chat_example(record: Record, layout: Layout, line: int) -> Example:
    turns = _turns(record.get(layout.prompt))
    answers: tuple[str, ...] = ()
    if layout.completion is not None:
        answers = _answers(record, layout.completion)
    elif turns[-1].role == "assistant":
        answers = (turns[-1].content,)
        turns = turns[:-1]
    if not turns or turns[-1].role != "user":
        raise BadRecord("the conversation has no user turn before the answer")
    return _example(turns, answers, record, line)


def _turns(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadRecord("'messages' is not a list of turns")
    return tuple(_turn(turn, number) for number, turn in enumerate(value, start=1))


def _turn(turn: object, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRecord(f"turn {number} is {_kind(turn)}, not an object")
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(f"turn {number} has the role {str(role)[:40]!r}; known: {_listed(ROLES)}")
    if turn.get("tool_calls"):
        raise BadRecord(f"turn {number} calls tools, which is not supported")
    content = _joined_parts(turn.get("content"), number)
    if not content.strip():
        raise BadRecord(f"turn {number} is empty")
    return Message(role, content)


def _joined_parts(content: object, number: int) -> str:
    """A turn's text: a string, or OpenAI's list of parts if all of them are text."""
    if not isinstance(content, list):
        return _checked(content, f"the content of turn {number}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise BadRecord(f"turn {number} holds a part of type {str(kind)[:40]!r}, not text")
        texts.append(_checked(part.get("text"), f"a part of turn {number}"))
    return "".join(texts)


def _example(
    turns: tuple[Message, ...], answers: tuple[str, ...], record: Record, line: int
) -> Example:
    """Completion and references together: each stands in for the other where it is missing."""
    if not _absent(record.get("system")):
        turns = (Message("system", _text(record, "system")), *turns)
    references = answers
    if not _absent(record.get("references")):
        references = _strings(record["references"], "references")
        answers = answers or references
    return Example(turns, answers[0] if answers else None, references, line)


def _answers(record: Record, key: str | None) -> tuple[str, ...]:
    value = None if key is None else record.get(key)
    if _absent(value):
        return ()
    return _strings(value, str(key)) if isinstance(value, list) else (_checked(value, f"'{key}'"),)


def _strings(value: object, key: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    texts = tuple(_checked(item, f"'{key}'") for item in values)
    if not all(text.strip() for text in texts):
        raise BadRecord(f"'{key}' holds an empty text")
    return texts


def _text(record: Record, key: str) -> str:
    if key not in record:
        raise BadRecord(f"no '{key}'")
    text = _checked(record[key], f"'{key}'")
    if not text.strip():
        raise BadRecord(f"'{key}' is empty")
    return text


def _checked(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name} is {_kind(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # A lone surrogate, from a \ud800 escape or from bytes that were no UTF-8.
        raise BadRecord(f"{name} is not valid Unicode (UTF-8)") from None
    return value


def _absent(value: object) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "missing" if value is None else names.get(type(value), "an object")


def _refuse_missing(names: list[str], *keys: str | None) -> None:
    missing = [key for key in keys if key is not None and key not in names]
    if missing:
        raise DatasetError(f"no column {_listed(missing)}; the columns are {_listed(names)}")


def _default_completion(names: list[str], prompt_key: str) -> str | None:
    return next((key for key in _COMPLETION_KEYS if key in names and key != prompt_key), None)


def _with_completion(layout: Layout, completion_key: str | None) -> Layout:
    if completion_key is None:
        return layout
    name = f"{layout.name.split('/')[0]}/{completion_key}"
    return Layout(name, layout.prompt, completion_key, layout.context)


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name[:40]) for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
