"""JSON schemas to grammars by llama_cpp's converter, which is given only what it gets right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_cpp import llama_grammar

from edgelora.engine.gbnf import MAX_REPETITIONS, check_gbnf
from edgelora.engine.json_schema import reduce_schema
from edgelora.errors import InvalidGrammar, SchemaError

__all__ = [
    "JSON_OBJECT_GBNF",
    "InvalidGrammar",
    "SchemaError",
    "check_gbnf",
    "json_schema_to_gbnf",
    "schema_rules",
    "text_to_gbnf",
]

JSON_OBJECT_GBNF: str = llama_grammar.JSON_GBNF
MAX_GRAMMAR_BYTES = 1_000_000

# What `check_gbnf` finds, said of a schema.
_IN_WORDS = {
    "left recursion": "a $ref that leads back to itself, with nothing between",
    "ever ends": "every value would contain itself, and none ever ends",
    "ever more ways": "alternatives of a recursive schema that begin alike: "
    "name the property that tells them apart first",
    "too many ways": "more alternatives at one place than can be tried",
    "unfold": "its counts ask for too much at once",
}
# The converter's own rule lets line breaks into a string, and halves of surrogate pairs.
_CHAR = (
    r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cefA-CEF] [0-9a-fA-F]{3}'
    r" | [dD] [0-7] [0-9a-fA-F]{2}))"
)
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"})


def json_schema_to_gbnf(
    schema: Mapping[str, Any],
    *,
    max_bytes: int = 64_000,
    max_depth: int = 64,
    max_repetitions: int = MAX_REPETITIONS,
) -> str:
    """A grammar whose every text is JSON that the schema accepts.

    The grammar may allow less than the schema, never more: no properties beside those that are
    named (unless only `additionalProperties` is given), properties in their order, tuples of
    exactly the items listed, numbers of at most 16 digits before the point.

    Args:
        max_bytes, max_depth: of the schema as JSON.
        max_repetitions: the largest count of minItems, maxLength and their like.

    Raises:
        SchemaError: names every keyword that is not enforced, every bad `$ref`, and its place.
    """
    limits = {"max_bytes": max_bytes, "max_depth": max_depth, "max_repetitions": max_repetitions}
    grammar = schema_rules({"": schema}, **limits)
    try:
        check_gbnf(grammar, MAX_GRAMMAR_BYTES)
    except InvalidGrammar as error:
        # The grammar's rules have names that the caller never saw.
        known = (words for sign, words in _IN_WORDS.items() if sign in str(error))
        said = next(known, str(error).partition(": ")[2])
        raise SchemaError(
            "the JSON schema makes a grammar that cannot be used", problems=[said]
        ) from error
    return grammar


def schema_rules(
    schemas: Mapping[str, Mapping[str, Any]],
    *,
    max_bytes: int = 64_000,
    max_depth: int = 64,
    max_repetitions: int = MAX_REPETITIONS,
) -> str:
    """Rules of a grammar: one for each schema, named as given ("" is `root`), and `space`.

    They are not checked as a whole: `json_schema_to_gbnf` and what adds a root to them do that.

    Raises:
        SchemaError: as `json_schema_to_gbnf`; the problems begin with the schema's name.
    """
    converter = _Converter()
    problems: list[str] = []
    for i, (name, schema) in enumerate(schemas.items()):
        try:
            reduced = reduce_schema(
                schema,
                max_bytes=max_bytes,
                max_depth=max_depth,
                max_repetitions=min(max_repetitions, MAX_REPETITIONS),
                prefix=f"d{i}x",
            )
            converter.visit(converter.resolve_refs(reduced, ""), name)
        except SchemaError as error:
            said = error.problems or (error.what,)
            problems += [f"{name}: {one}" if name else one for one in said]
        except RecursionError:
            problems.append(f"{name or '#'}: its references go too deep")
    if problems:
        raise SchemaError("the JSON schema cannot be enforced", problems=problems)
    return str(converter.format_grammar())


def text_to_gbnf(text: str) -> str:
    """A literal of GBNF that is exactly `text`."""
    return f'"{text.translate(_ESCAPES)}"'


_Base: Any = llama_grammar.SchemaConverter


class _Converter(_Base):  # type: ignore[misc]
    """llama_cpp's converter, with what it gets wrong put right.

    It writes repetitions out as nested parentheses (too deep for its own parser), `"` and `\\` of
    constants without a backslash, and patterns that leave the string.
    """

    def __init__(self) -> None:
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)

    def visit(self, schema: dict[str, Any], name: str) -> str:
        """The name of the rule of a schema, added with all that it needs."""
        if "minLength" in schema:
            least, most = schema["minLength"], schema["maxLength"]
            char = self._add_primitive("char", llama_grammar.BuiltinRule(_CHAR))
            return self._rule(name, rf'"\"" {char}{_times(least, most)} "\"" space')
        if "items" in schema:
            item = self.visit(schema["items"], f"{name}-item")
            return self._rule(name, f'"[" space {_items(item, schema)} "]" space')
        return str(super().visit(schema, name))

    def _visit_pattern(self, pattern: str, name: str) -> str:
        return self._rule(name, rf'"\"" {pattern} "\"" space')

    def _add_primitive(self, name: str, rule: llama_grammar.BuiltinRule) -> str:
        # Rules such as `string` name `char` as what they need: it is there before they ask.
        if "char" not in self._rules:
            self._rules["char"] = _CHAR
        return name if name == "char" else str(super()._add_primitive(name, rule))

    def _format_literal(self, literal: str) -> str:
        return text_to_gbnf(literal)

    def _generate_constant_rule(self, value: str) -> str:
        return text_to_gbnf(value)

    def _rule(self, name: str, rule: str) -> str:
        return str(self._add_rule(name, rule))


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _items(item: str, schema: Mapping[str, Any]) -> str:
    least, most = schema["minItems"], schema["maxItems"]
    if most == 0:
        return ""
    more = _times(max(0, least - 1), None if most is None else most - 1)
    some = f'{item} ("," space {item}){more}'
    return some if least else f"({some})?"
