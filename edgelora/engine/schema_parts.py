"""Parts of a JSON Schema: what a `$ref` leads to, and whether two schemas exclude each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard
from urllib.parse import unquote

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def find_target(root: Mapping[str, Any], pointer: str) -> object:
    """What a reference inside the same schema leads to; None if nothing, or elsewhere."""
    if pointer != "#" and not pointer.startswith("#/"):
        return None
    target: object = root
    for part in unquote(pointer).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping) and key in target:
            target = target[key]
        elif isinstance(target, list | tuple) and key.isdecimal() and int(key) < len(target):
            target = target[int(key)]
        else:
            return None
    return target


def follow(root: Mapping[str, Any], schema: object) -> Mapping[str, Any] | None:
    """The schema itself or what its references lead to; None if that is no object."""
    for _ in range(10):
        if not isinstance(schema, Mapping):
            return None
        if "$ref" not in schema:
            return schema
        schema = find_target(root, str(schema["$ref"]))
    return None


def are_apart(root: Mapping[str, Any], parts: Sequence[object]) -> bool:
    """Whether no two schemas can hold at once, as types, constants and required names show."""
    pairs = ((a, b) for i, a in enumerate(parts) for b in parts[i + 1 :])
    return len(parts) <= 64 and all(_exclude(root, a, b, 0) for a, b in pairs)


def _exclude(root: Mapping[str, Any], one: object, other: object, depth: int) -> bool:
    a, b = follow(root, one), follow(root, other)
    if a is None or b is None or depth > 3:
        return False
    if _possible_types(a).isdisjoint(_possible_types(b)):
        return True
    values = [{json.dumps(v, sort_keys=True) for v in _values(x)} for x in (a, b)]
    if all(values) and values[0].isdisjoint(values[1]):
        return True
    # A property that both require makes them exclude each other if its schemas do.
    return any(
        _exclude(root, a["properties"][name], b["properties"][name], depth + 1)
        for name in _members(a, "required")
        if name in _members(b, "required")
        and all(name in _members(x, "properties") for x in (a, b))
    )


def _members(schema: Mapping[str, Any], keyword: str) -> Sequence[str] | Mapping[str, Any]:
    value = schema.get(keyword)
    wanted = Mapping if keyword == "properties" else list | tuple
    return value if isinstance(value, wanted) else ()


def _values(schema: Mapping[str, Any]) -> list[Any]:
    if "const" in schema:
        return [schema["const"]]
    return list(schema["enum"]) if isinstance(schema.get("enum"), list | tuple) else []


def _possible_types(schema: Mapping[str, Any]) -> set[str]:
    given = schema.get("type")
    types = {given} if isinstance(given, str) else set(given) if are_texts(given) else set()
    if not types and (values := _values(schema)):
        types = {kind for value in values for kind in types_of(value)}
    types = types or set(TYPES)
    return types | ({"integer"} if "number" in types else set())


def types_of(value: object) -> set[str]:
    """The types of JSON Schema that a value has; 1.0 is an integer."""
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    if isinstance(value, str):
        return {"string"}
    return {"object" if isinstance(value, Mapping) else "array"}


def are_texts(value: object) -> TypeGuard[Sequence[str]]:
    """Whether a value is a list of strings."""
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
