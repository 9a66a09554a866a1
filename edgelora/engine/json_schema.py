"""A JSON Schema, checked and reduced to what llama_cpp's converter turns into a sound grammar."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgelora.engine.patterns import PatternError, pattern_to_gbnf
from edgelora.engine.schema_parts import TYPES, are_apart, are_texts, find_target, follow, types_of
from edgelora.errors import SchemaError

ANNOTATIONS = frozenset(
    "title description default example examples $schema $comment $anchor $defs definitions "
    "deprecated readOnly writeOnly discriminator contentMediaType contentEncoding".split()
)
COMBINERS = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
OF_TYPE = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
}
ENFORCED = {"type", *COMBINERS, *(keyword for some in OF_TYPE.values() for keyword in some)}
ANY: dict[str, Any] = {"type": [kind for kind in TYPES if kind != "integer"]}
MAX_PROPERTIES = 256  # of one object: the converter's work grows with their square
MAX_SCHEMAS = 20_000  # visited; merging `allOf` copies schemas

_DAY = (
    "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
    r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_HEX = "[0-9a-fA-F]"
# llama_cpp's rules allow the 31st of February; these leave the 29th out.
FORMATS = {
    "date": f"^[1-9][0-9]{{3}}-{_DAY}$",
    "time": f"^{_TIME}$",
    "date-time": f"^[1-9][0-9]{{3}}-{_DAY}T{_TIME}$",
    "uuid": f"^{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}$",
}


def reduce_schema(
    schema: Mapping[str, Any],
    *,
    max_bytes: int,
    max_depth: int,
    max_repetitions: int,
    prefix: str = "d",
) -> dict[str, Any]:
    """The schema in the converter's terms; `pattern` is GBNF already, and `$ref`s are renamed.

    Args:
        prefix: of the new names of what `$ref`s lead to.

    Raises:
        SchemaError: with every problem found, each with its place as a JSON pointer.
    """
    _refuse_size(schema, max_bytes, max_depth)
    reducer = _Reducer(schema, max_depth, max_repetitions, prefix)
    whole = reducer.reduce(schema, "#")
    reduced = {"anyOf": [whole], "$defs": reducer.definitions()}
    if reducer.problems:
        raise SchemaError("the JSON schema cannot be enforced", problems=list(reducer.problems))
    return reduced


def _refuse_size(schema: object, max_bytes: int, max_depth: int) -> None:
    depth, level = 0, [schema]
    while level and depth <= max_depth:
        depth += 1
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise SchemaError(f"the JSON schema is deeper than {max_depth} levels")
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"the JSON schema is not JSON: {error}") from error
    if len(text) > max_bytes:
        raise SchemaError(f"the JSON schema has {len(text)} bytes, {max_bytes} are allowed")


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        return iter(value.values())
    return iter(value if isinstance(value, list | tuple) else ())


class _Reducer:
    """Walks a schema with its place, gathering problems."""

    def __init__(
        self, root: Mapping[str, Any], max_depth: int, max_repetitions: int, prefix: str
    ) -> None:
        self.root = root
        self.prefix = prefix
        self.max_depth = max_depth
        self.max_repetitions = max_repetitions
        self.problems: dict[str, None] = {}
        self.names: dict[str, str] = {}
        self.n_visited = 0

    def definitions(self) -> dict[str, Any]:
        """The schemas that are referred to, by the names that stand for them."""
        reduced: dict[str, Any] = {}
        while len(reduced) < len(self.names):
            for pointer, name in list(self.names.items()):
                if name not in reduced:
                    reduced[name] = self.reduce(find_target(self.root, pointer), pointer)
        return reduced

    def reduce(self, schema: object, at: str, depth: int = 0) -> dict[str, Any]:
        """One schema; what is wrong with it is noted, and anything stands in for it."""
        self.n_visited += 1
        if self.n_visited > MAX_SCHEMAS or depth > self.max_depth:
            self._problem("#", "too large once its allOf are merged")
            return ANY
        if schema is True:
            return ANY
        if not isinstance(schema, Mapping):
            said = "nothing is allowed" if schema is False else "a schema is an object or true"
            self._problem(at, said)
            return ANY
        self._name_unenforced(schema, at)
        combiners = [keyword for keyword in COMBINERS if keyword in schema]
        if combiners:
            return self._combined(combiners[0], schema, at, depth)
        if isinstance(schema.get("type"), list | tuple):
            return self._several_types(schema, at, depth)
        return self._of_one_type(schema, at, depth)

    def _name_unenforced(self, schema: Mapping[str, Any], at: str) -> None:
        for keyword in schema:
            known = keyword in ENFORCED or keyword in ANNOTATIONS
            known |= keyword == "$id" and at == "#"
            if not known and not str(keyword).startswith("x-"):
                self._problem(f"{at}/{keyword}", "this keyword is not enforced")

    def _combined(
        self, keyword: str, schema: Mapping[str, Any], at: str, depth: int
    ) -> dict[str, Any]:
        allowed = {keyword} | ({"type"} if keyword in ("const", "enum", "allOf") else set())
        for beside in schema:
            if beside in ENFORCED and beside not in allowed:
                self._problem(f"{at}/{beside}", f"not enforced beside {keyword}")
        if keyword == "$ref":
            return self._reference(schema["$ref"], at)
        if keyword in ("const", "enum"):
            return self._constants(keyword, schema, at)
        parts = schema[keyword]
        if not isinstance(parts, list | tuple) or not parts:
            self._problem(f"{at}/{keyword}", "a list of schemas is needed")
            return ANY
        if keyword == "allOf":
            return self._merged(parts, schema, at, depth)
        if keyword == "oneOf" and not are_apart(self.root, parts):
            self._problem(f"{at}/oneOf", "alternatives that may hold at once: use anyOf")
        return {
            "anyOf": [
                self.reduce(part, f"{at}/{keyword}/{i}", depth + 1) for i, part in enumerate(parts)
            ]
        }

    def _reference(self, pointer: object, at: str) -> dict[str, Any]:
        if not isinstance(pointer, str) or find_target(self.root, pointer) is None:
            self._problem(f"{at}/$ref", f"{pointer!r} leads nowhere in this schema")
            return ANY
        # Names of our own: the converter takes a rule of the same name for the one referred to.
        name = self.names.setdefault(pointer, f"{self.prefix}{len(self.names)}def")
        return {"$ref": f"#/$defs/{name}"}

    def _constants(self, keyword: str, schema: Mapping[str, Any], at: str) -> dict[str, Any]:
        values = [schema["const"]] if keyword == "const" else schema["enum"]
        if not isinstance(values, list | tuple):
            self._problem(f"{at}/enum", "a list of values is needed")
            return ANY
        if "type" in schema:
            types = self._types(schema, at)
            values = [value for value in values if not types.isdisjoint(types_of(value))]
        if not values:
            self._problem(f"{at}/{keyword}", "none of its values is possible")
            return ANY
        # As text: the converter would look for references inside values.
        return {"enum": list(dict.fromkeys(json.dumps(v, ensure_ascii=False) for v in values))}

    def _types(self, schema: Mapping[str, Any], at: str) -> set[str]:
        given = schema["type"]
        types = list(given) if isinstance(given, list | tuple) else [given]
        if not types or any(kind not in TYPES for kind in types):
            self._problem(f"{at}/type", f"one or more of {', '.join(TYPES)}")
        return {kind for kind in types if kind in TYPES}

    def _several_types(self, schema: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        types = self._types(schema, at)
        if "number" in types:
            types.discard("integer")
        return {
            "anyOf": [
                self._of_one_type({**schema, "type": kind}, at, depth)
                for kind in TYPES
                if kind in types
            ]
            or [ANY]
        }

    def _of_one_type(self, schema: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        if "type" in schema:
            kind = next(iter(self._types(schema, at)), None)
        else:
            kind = next(
                (k for k, words in OF_TYPE.items() if any(w in schema for w in words)), None
            )
        if kind == "object":
            return self._object(schema, at, depth)
        if kind == "array":
            return self._array(schema, at, depth)
        if kind == "string":
            return self._string(schema, at)
        return {"type": kind} if kind else ANY

    def _object(self, schema: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        properties = schema.get("properties")
        required = schema.get("required", [])
        others = schema.get("additionalProperties", properties is None)
        value = self._others(others, at, depth)
        if not isinstance(properties, Mapping | None) or not are_texts(required):
            self._problem(at, "properties is an object of schemas, required a list of names")
            return ANY
        for name in required:
            if name not in (properties or {}):
                self._problem(f"{at}/required", f"{name!r} is not among properties")
        if properties is None:
            return {"type": "object", "additionalProperties": value}
        if len(properties) > MAX_PROPERTIES:
            self._problem(f"{at}/properties", f"more than {MAX_PROPERTIES}")
        # Others beside these are left out: the grammar could not keep them from repeating a name.
        return {
            "type": "object",
            "properties": {
                name: self.reduce(inner, f"{at}/properties/{name}", depth + 1)
                for name, inner in properties.items()
            },
            "required": list(required),
            "additionalProperties": False,
        }

    def _others(self, others: object, at: str, depth: int) -> bool | dict[str, Any]:
        if isinstance(others, bool):
            return others and ANY
        return self.reduce(others, f"{at}/additionalProperties", depth + 1)

    def _array(self, schema: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        least, most = self._counts(schema, "minItems", "maxItems", at)
        items, listed = schema.get("items", True), schema.get("prefixItems")
        if isinstance(items, list | tuple):
            items, listed = True, items
        if listed is None and items is False:
            listed = []
        if listed is None:
            item = self.reduce(items, f"{at}/items", depth + 1)
            return {"type": "array", "items": item, "minItems": least, "maxItems": most}
        if not isinstance(listed, list | tuple):
            self._problem(f"{at}/prefixItems", "a list of schemas is needed")
            return ANY
        if least > len(listed) or (most is not None and most < len(listed)):
            self._problem(at, f"arrays of exactly {len(listed)} items are what it can have")
        where = "items" if "prefixItems" not in schema else "prefixItems"
        return {
            "type": "array",
            "prefixItems": [
                self.reduce(item, f"{at}/{where}/{i}", depth + 1) for i, item in enumerate(listed)
            ],
        }

    def _string(self, schema: Mapping[str, Any], at: str) -> dict[str, Any]:
        least, most = self._counts(schema, "minLength", "maxLength", at)
        given = [word for word in ("pattern", "format") if word in schema]
        if len(given) + (least > 0 or most is not None) > 1:
            self._problem(at, "only one of pattern, format and lengths is enforced at once")
        if not given:
            bounds = {"minLength": least, "maxLength": most}
            return {"type": "string"} | (bounds if least or most is not None else {})
        pattern = schema[given[0]]
        if given == ["format"]:
            pattern = FORMATS.get(pattern) if isinstance(pattern, str) else None
            if pattern is None:
                known = ", ".join(FORMATS)
                self._problem(f"{at}/format", f"{schema['format']!r} is not enforced ({known} are)")
                return ANY
        try:
            return {"type": "string", "pattern": pattern_to_gbnf(pattern, self.max_repetitions)}
        except PatternError as error:
            self._problem(f"{at}/pattern", str(error))
            return ANY

    def _counts(
        self, schema: Mapping[str, Any], minimum: str, maximum: str, at: str
    ) -> tuple[int, int | None]:
        counts = {word: schema[word] for word in (minimum, maximum) if word in schema}
        for word, count in counts.items():
            if not _is_count(count):
                self._problem(f"{at}/{word}", "a number of 0 or more is needed")
                return 0, None
            if count > self.max_repetitions:
                self._problem(f"{at}/{word}", f"more than {self.max_repetitions} is not enforced")
        least = int(counts.get(minimum, 0))
        most = int(counts[maximum]) if maximum in counts else None
        if most is not None and most < least:
            self._problem(f"{at}/{maximum}", f"less than {minimum}")
        return least, most

    def _merged(
        self, parts: Sequence[object], schema: Mapping[str, Any], at: str, depth: int
    ) -> dict[str, Any]:
        """`allOf` as one schema: objects whose properties have different names."""
        if len(parts) == 1 and "type" not in schema:
            return self.reduce(parts[0], f"{at}/allOf/0", depth + 1)
        properties: dict[str, Any] = {}
        required: list[str] = []
        for i, part in enumerate(parts):
            whole = follow(self.root, part)
            kept = {w: v for w, v in (whole or {}).items() if w not in ANNOTATIONS}
            inner = kept.get("properties", {})
            closed = kept.get("additionalProperties", True) is not True
            plain = kept.keys() <= {"type", *OF_TYPE["object"]} and isinstance(inner, Mapping)
            plain = plain and kept.get("type", "object") == "object" and not closed
            if whole is None or not plain or not properties.keys().isdisjoint(inner):
                self._problem(f"{at}/allOf/{i}", "only open objects of different properties merge")
                return ANY
            properties |= inner
            required += kept.get("required", []) if are_texts(kept.get("required", [])) else []
        if schema.get("type", "object") != "object":
            self._problem(f"{at}/type", "not enforced beside allOf")
        merged = {"type": "object", "properties": properties, "required": required}
        return self._object(merged, at, depth + 1)

    def _problem(self, at: str, what: str) -> None:
        self.problems[f"{at}: {what}"] = None


def _is_count(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0 and value == int(value)
