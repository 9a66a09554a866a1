"""Grammars: schemas enforced (texts drawn from them are valid), and none that ends the process."""

from __future__ import annotations

import ctypes
import functools
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import llama_cpp
import pico
import pytest
from llama_cpp import llama_grammar

from edgelora.engine.context import Row, open_context
from edgelora.engine.grammar import JSON_OBJECT_GBNF, check_gbnf, json_schema_to_gbnf, text_to_gbnf
from edgelora.engine.model import Model, ModelOptions, open_model
from edgelora.errors import InvalidGrammar, SchemaError

NODE = {
    "type": "object",
    "properties": {"v": {"enum": [1, 2]}, "kids": {"items": {"$ref": "#/$defs/N"}, "maxItems": 2}},
    "required": ["v"],
}
ENFORCED: dict[str, Any] = {
    "string": {"type": "string", "minLength": 2, "maxLength": 4},
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
    "integer": {"type": "integer"},
    "boolean or null": {"type": ["boolean", "null"]},
    "enum with escapes": {"enum": ['a"b', "tab\t\\", "é😀", 1.5, None, {"$ref": "#"}, [True]]},
    "enum of a type": {"type": "integer", "enum": [3, "3", 4.5]},
    "const": {"const": {"deep": ["\n"]}},
    "pattern": {"type": "string", "pattern": r"^(a.|[^b]{2,3}|\d+\.\w?)-[A-Z]{0,3}$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"const": "x"}]},
    "array of few": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    "at least": {"type": "array", "items": {"type": "null"}, "minItems": 2},
    "optional": {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in ("a", "b", "c", "d", 'e "quoted"')},
        "required": ["c"],
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"const": 0}},
    "names of rules": {
        "properties": {
            "integral_part": {"const": "z"}, "string": {"type": "integer"}, "": {"type": "number"},
            "char": {"enum": ["q"]}, "root": {"type": "null"}, "*": {"type": "null"},
        },
        "required": ["integral_part", "string", "", "char", "root", "*"],
    },
    "anyOf": {"anyOf": [{"type": "null"}, {"type": "object", "required": []}, {"const": "k"}]},
    "oneOf apart": {
        "oneOf": [
            {"properties": {"t": {"const": "a"}, "x": {"type": "null"}}, "required": ["t", "x"]},
            {"properties": {"t": {"const": "b"}}, "required": ["t"]},
        ],
        "discriminator": {"propertyName": "t"},
    },
    "allOf": {
        "allOf": [
            {"properties": {"a": {"type": "null"}}, "required": ["a"]},
            {"$ref": "#/definitions/b"},
        ],
        "definitions": {"b": {"type": "object", "properties": {"b": {"const": 1}}}},
    },
    "recursive": {"$ref": "#/$defs/N", "$defs": {"N": NODE}},
    "a property named like a definition": {
        "type": "object",
        "properties": {"N": {"enum": ["plain"]}, "n": {"$ref": "#/$defs/N"}},
        "required": ["N", "n"],
        "$defs": {"N": NODE},
    },
}  # fmt: skip


class Drawing:
    """Texts of a grammar, drawn by llama.cpp from a pico model at temperature 1."""

    def __init__(self, model: Model, context: Any) -> None:
        self.model, self.context = model, context

    def draw(
        self,
        grammar: str,
        seed: int,
        max_tokens: int = 1500,
        *,
        likely: str = '"}]',
        end: float = 0,
    ) -> str | None:
        """One text; None if it had no end after `max_tokens`.

        Args:
            likely: characters whose tokens are made likelier, so that texts end.
            end: what is added to the logits of tokens that end the text.
        """
        vocabulary = self.model.vocabulary
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        native = llama_cpp.llama_model_get_vocab(self.model.handle)
        sampler = llama_cpp.llama_sampler_init_grammar(native, grammar.encode(), b"root")
        assert sampler
        llama_cpp.llama_sampler_chain_add(chain, sampler)
        llama_cpp.llama_sampler_chain_add(chain, self._bias(likely, end))
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(1.0))
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
        ids: list[int] = []
        self.context.clear()
        token = vocabulary.bos
        try:
            for position in range(max_tokens):
                self.context.decode([Row(token, position, 0, output=True)])
                token = llama_cpp.llama_sampler_sample(chain, self.context.handle, -1)
                if vocabulary.is_end(token):
                    return vocabulary.decode(ids).decode()
                ids.append(token)
        finally:
            llama_cpp.llama_sampler_free(chain)
        return None

    def accepts(self, grammar: str, text: str) -> bool:
        """Whether llama.cpp's grammar allows the whole text, and its end after it."""
        native = llama_cpp.llama_model_get_vocab(self.model.handle)
        sampler = llama_cpp.llama_sampler_init_grammar(native, grammar.encode(), b"root")
        data = (llama_cpp.llama_token_data * 1)()
        # One token for each byte: SentencePiece would put a space before the text.
        first = next(t for t in range(300) if self.model.vocabulary.text_of(t) == "<0x00>")
        tokens = [first + byte for byte in text.encode()] + [self.model.vocabulary.eos]
        try:
            for token in tokens:
                data[0].id, data[0].logit = token, 0.0
                array = llama_cpp.llama_token_data_array(data, 1, -1, False)
                llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
                if data[0].logit != 0.0:
                    return False
                llama_cpp.llama_sampler_accept(sampler, token)
        finally:
            llama_cpp.llama_sampler_free(sampler)
        return True

    def _bias(self, likely: str, end: float) -> Any:
        """The bias; control tokens never come, but for those that end the text."""
        vocabulary = self.model.vocabulary
        values = {vocabulary.tokenize(character)[-1]: 4.0 for character in likely}
        for token in vocabulary.control_ids.values():
            values[token] = end if vocabulary.is_end(token) else -1e9
        entries = (llama_cpp.llama_logit_bias * len(values))(*values.items())
        return llama_cpp.llama_sampler_init_logit_bias(vocabulary.n_tokens, len(values), entries)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawing]:
    dims = pico.Dims(n_embd=16, n_ff=16, n_layer=1, n_ctx=2048)
    base = pico.write_base(tmp_path_factory.mktemp("base") / "base.gguf", dims=dims)
    with (
        open_model(base, ModelOptions(n_threads=1)) as model,
        open_context(model, n_ctx=2048, n_batch=64, n_sequences=1) as context,
    ):
        yield Drawing(model, context)


@pytest.mark.parametrize("name", ENFORCED)
def test_what_is_drawn_is_valid(name: str, drawing: Drawing) -> None:
    schema = ENFORCED[name]
    grammar = json_schema_to_gbnf(schema)
    checker = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    drawn = [drawing.draw(grammar, seed) for seed in range(6)]
    texts = [text for text in drawn if text is not None]
    assert len(texts) >= 3
    for text in texts:
        checker.validate(json.loads(text))


def test_any_json_and_the_grammar_of_json_object(drawing: Drawing) -> None:
    for grammar in (json_schema_to_gbnf({}), JSON_OBJECT_GBNF):
        check_gbnf(grammar)
        texts = [drawing.draw(grammar, seed, 400) for seed in range(6)]
        values = [json.loads(text) for text in texts if text is not None]
        assert values
        assert grammar != JSON_OBJECT_GBNF or all(isinstance(value, dict) for value in values)


@pytest.mark.parametrize(
    ("schema", "places"),
    [
        ({"type": "number", "minimum": 0.5, "multipleOf": 2}, ["#/minimum", "#/multipleOf"]),
        ({"not": {}}, ["#/not"]),
        ({"if": {}, "then": {}, "else": {}}, ["#/if", "#/then", "#/else"]),
        ({"properties": {"a": {"patternProperties": {}}}}, ["#/properties/a/patternProperties"]),
        ({"items": {"uniqueItems": True, "contains": {}}}, ["#/items/uniqueItems"]),
        ({"type": "object", "minProperties": 1, "dependentRequired": {}}, ["#/minProperties"]),
        ({"type": "object", "propertyNames": {}, "unevaluatedProperties": False}, ["#/propertyN"]),
        ({"type": "string", "format": "email"}, ["#/format: 'email'"]),
        ({"type": "string", "maxLenght": 3}, ["#/maxLenght"]),
        ({"type": "string", "pattern": "a+"}, ["#/pattern: must begin with ^"]),
        ({"type": "string", "pattern": r"^a\$"}, ["#/pattern: must begin with ^"]),
        ({"type": "string", "pattern": "^a|b$"}, ["#/pattern: an alternation"]),
        ({"type": "string", "pattern": "^(?=a)a$"}, ["#/pattern: look-around"]),
        ({"type": "string", "pattern": "^(a$"}, ["#/pattern: a parenthesis"]),
        ({"type": "string", "pattern": "^a)$"}, ["#/pattern: "]),
        ({"type": "string", "pattern": r"^(a)\1$"}, ["#/pattern: \\1"]),
        ({"type": "string", "pattern": "^a{1,9999}$"}, ["#/pattern: {1,9999}"]),
        ({"type": "string", "pattern": "^a*?$"}, ["#/pattern: lazy"]),
        ({"type": "string", "pattern": '^"$'}, ["#/pattern: only characters"]),
        ({"type": "string", "pattern": "^a$", "maxLength": 1}, ["#: only one of"]),
        ({"type": "string", "maxLength": 5000}, ["#/maxLength: more than 2000"]),
        ({"type": "array", "minItems": 3, "maxItems": 2}, ["#/maxItems: less than"]),
        ({"type": "array", "minItems": -1}, ["#/minItems: a number"]),
        ({"prefixItems": [{}], "minItems": 2}, ["#: arrays of exactly 1"]),
        ({"properties": {}, "required": ["a"]}, ["#/required: 'a'"]),
        ({"required": ["a"]}, ["#/required: 'a'"]),
        ({"properties": {"a": False}}, ["#/properties/a: nothing is allowed"]),
        ({"properties": {"a": 3}}, ["#/properties/a: a schema is"]),
        ({"properties": [1]}, ["#: properties is an object"]),
        ({"type": "value"}, ["#/type"]),
        ({"type": []}, ["#/type"]),
        ({"type": "null", "enum": [1]}, ["#/enum: none of its values"]),
        ({"enum": ["a"], "maxLength": 3}, ["#/maxLength: not enforced beside enum"]),
        ({"$ref": "#/$defs/none"}, ["#/$ref: '#/$defs/none'"]),
        ({"$ref": "https://example.com/schema"}, ["#/$ref: 'https"]),
        ({"$ref": 3}, ["#/$ref: 3"]),
        ({"$ref": "#/$defs/a", "type": "null", "$defs": {"a": {}}}, ["#/type: not enforced"]),
        ({"$ref": "#"}, ["leads back to itself"]),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, ["none ever ends"]),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"minimum": 1}}}, ["#/$defs/a/minimum"]),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, ["#/oneOf: alternatives"]),
        ({"oneOf": [{}], "anyOf": [{}]}, ["#/oneOf: not enforced beside anyOf"]),
        ({"anyOf": []}, ["#/anyOf"]),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, ["#/allOf/0"]),
        ({"properties": {f"p{i}": {} for i in range(300)}}, ["#/properties: more than 256"]),
    ],
)
def test_what_is_not_enforced_is_named_with_its_place(
    schema: dict[str, Any], places: list[str]
) -> None:
    with pytest.raises(SchemaError) as caught:
        json_schema_to_gbnf(schema)
    assert all(any(place in problem for problem in caught.value.problems) for place in places)


def test_every_problem_is_told_at_once() -> None:
    inner = {"type": "string", "format": "color", "contentSchema": {}}
    schema = {"properties": {"a": inner, "b": {"minimum": 1}}, "required": ["c"], "not": {}}
    with pytest.raises(SchemaError) as caught:
        json_schema_to_gbnf(schema)
    assert len(caught.value.problems) == 5


def test_annotations_pass_and_change_nothing() -> None:
    notes = {"title": "t", "description": "d", "default": 1, "examples": [{"$ref": "x"}]}
    notes |= {"$schema": "s", "$id": "i", "$comment": "c", "deprecated": True, "readOnly": True}
    assert json_schema_to_gbnf({"type": "null", **notes}) == json_schema_to_gbnf({"type": "null"})


def test_schemas_that_are_too_large_or_no_json() -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(80):
        deep = {"items": deep}
    wide = {"enum": ["x" * 100 + str(i) for i in range(1000)]}
    merging = {"d0": {"properties": {"x": {"type": "null"}}}}
    for i in range(1, 25):
        both = {f"{name}{i}": {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}, {}]} for name in "pq"}
        merging[f"d{i}"] = {"properties": both}
    bomb = {"allOf": [{"$ref": "#/$defs/d24"}, {}], "$defs": merging}
    chain = {f"c{i}": {"items": {"$ref": f"#/$defs/c{i + 1}"}} for i in range(900)}
    long = {"$ref": "#/$defs/c0", "$defs": {**chain, "c900": {"type": "null"}}}
    many = {"enum": list(range(9000))}
    for schema in (deep, wide, bomb, long, many, {"const": float("nan")}, {"const": "\ud800"}):
        with pytest.raises(SchemaError):
            json_schema_to_gbnf(schema)
    own: dict[str, Any] = {}
    own["items"] = own
    with pytest.raises(SchemaError):
        json_schema_to_gbnf(own)


def test_a_text_as_a_literal(drawing: Drawing) -> None:
    text = 'a "b" \\ \n\r [c]'
    assert drawing.draw(f"root ::= {text_to_gbnf(text)}", 0) == text


@pytest.mark.parametrize(
    "grammar",
    [getattr(llama_grammar, name) for name in dir(llama_grammar) if name.endswith("_GBNF")],
)
def test_llama_cpps_own_grammars_pass(grammar: str) -> None:
    check_gbnf(grammar)


def test_recursions_that_begin_alike_only_where_it_does_no_harm() -> None:
    for grammar in (
        'root ::= "a" root | "a" root | "b"',
        'root ::= "a" root "a" | "b" root "b" | "c"',
        'root ::= t ([-+] t)*\nt ::= "(" root ")" | [0-9]+',
    ):
        check_gbnf(grammar)
    told_first = {
        "anyOf": [
            {
                "properties": {"op": {"const": op}, "of": {"$ref": "#"}, "by": {"$ref": "#"}},
                "required": ["op", "of", "by"],
            }
            for op in ("add", "take")
        ]
        + [{"type": "null"}]
    }
    json_schema_to_gbnf(told_first)
    told_last = json.loads(json.dumps(told_first))
    for one in told_last["anyOf"][:2]:
        one["properties"]["op"] = one["properties"].pop("op")
    with pytest.raises(SchemaError, match="tells them apart first"):
        json_schema_to_gbnf(told_last)


BAD_GRAMMARS = {
    "empty": ("", "no rule named root"),
    "no root": ('top ::= "a"', "no rule named root"),
    "root is only used": ("top ::= root", "no rule is named root"),
    "undefined": ("root ::= nothing", "no rule is named nothing"),
    "left recursion": ('root ::= root "a" | "b"', "left recursion"),
    "hidden left recursion": (
        'root ::= a root "x" | "y"\na ::= b\nb ::= c\nc ::= ""',
        "left recursion",
    ),
    "never ends": ('root ::= "a" root', "ever ends"),
    "huge repetition": ('root ::= "a"{1,1000000}', "more than 2000"),
    "backwards repetition": ('root ::= "a"{5,2}', "below its minimum"),
    "repeated repetition": ('root ::= (("a"{1,100} "b"){1,100}){1,100}', "multiply"),
    "much unfolded": ('root ::= "' + "a" * 3000 + '"{2000}', "unfold"),
    "empty repeated": ('root ::= ("a"?)* "b"', "may be empty"),
    "parenthesis": ('root ::= ("a"', r"expected \)"),
    "other parenthesis": ('root ::= "a")', "expected the end"),
    "deep": ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "parentheses inside"),
    "text without end": ('root ::= "a', "without an end"),
    "class without end": ("root ::= [a", "without an end"),
    "empty class": ("root ::= []", "no character matches"),
    "class of nothing": (r"root ::= [^\x00-\U0010FFFF]", "no character matches"),
    "a range backwards": ("root ::= [z-a]", "ends before it begins"),
    "escape": (r'root ::= "\d"', "unknown escape"),
    "escaped surrogate": (r'root ::= "\uD800"', "no text has"),
    "escaped NUL": (r'root ::= "\x00"', "no text has"),
    "past Unicode": (r'root ::= "\UFFFFFFFF"', "past U"),
    "NUL": ('root ::= "a"\0', "NUL"),
    "surrogate": ('root ::= "\ud800"', "surrogate"),
    "token": ("root ::= <[99999999]>", "tokens cannot be named"),
    "not token": ("root ::= !<|im_end|>", "tokens cannot be named"),
    "twice": ('root ::= "a"\nroot ::= "b"', "defined twice"),
    "nothing repeated": ("root ::= *", "nothing to repeat"),
    "underscore": ('root ::= "a"\na_b ::= "c"', "expected ::="),
    "long": ("# " + "x" * 70_000 + '\nroot ::= "a"', "bytes"),
    "ways that grow": ('root ::= s\ns ::= "a" s "x" | "a" s "y" | "b"', "ever more ways"),
    "ways that grow later": (
        'root ::= "p"{1,90} s\ns ::= (" " [a-f] s)* "x" | (" " [e-z] s "z")* "y"',
        "ever more ways",
    ),
    "many ways to begin": (
        "root ::= r0\nr40 ::= .\n" + "".join(f"r{i} ::= r{i + 1} | r{i + 1}\n" for i in range(40)),
        "too many ways",
    ),
    "a long chain": (
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(4000)) + "r4000 ::= .",
        "too many ways",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_GRAMMARS)
def test_grammars_that_llama_cpp_must_not_see(name: str) -> None:
    grammar, said = BAD_GRAMMARS[name]
    with pytest.raises(InvalidGrammar, match=said):
        check_gbnf(grammar)


FUZZ = """
import random, sys, ctypes, time
sys.path[:0] = {paths!r}
import llama_cpp
from test_grammar import mutated
from edgelora.engine.grammar import check_gbnf
from edgelora.engine.model import ModelOptions, open_model
from edgelora.errors import InvalidGrammar
from pathlib import Path

accepted = 0
with open_model(Path({base!r}), ModelOptions(n_threads=1)) as model:
    vocabulary = llama_cpp.llama_model_get_vocab(model.handle)
    n = model.vocabulary.n_tokens
    data = (llama_cpp.llama_token_data * n)()
    for seed in range({first}, {last}):
        grammar = mutated(seed)
        print(seed, flush=True, file=sys.stderr)
        try:
            check_gbnf(grammar)
        except InvalidGrammar:
            continue
        sampler = llama_cpp.llama_sampler_init_grammar(vocabulary, grammar.encode(), b"root")
        assert sampler, "checked, and refused by llama.cpp: " + repr(grammar)
        accepted += 1
        rng = random.Random(seed)
        for _ in range(12):
            for token in range(n):
                data[token].id, data[token].logit = token, 0.0
            array = llama_cpp.llama_token_data_array(data, n, -1, False)
            llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
            left = [d.id for d in data if d.logit == 0.0]
            if not left:
                break
            token = rng.choice(left)
            llama_cpp.llama_sampler_accept(sampler, token)
            if model.vocabulary.is_end(token):
                break
        llama_cpp.llama_sampler_free(sampler)
print(accepted)
"""


@functools.cache
def fuzz_sources() -> list[str]:
    names = [name for name in dir(llama_grammar) if name.endswith("_GBNF")]
    sources = [getattr(llama_grammar, name) for name in names]
    sources += [json_schema_to_gbnf(schema) for schema in ENFORCED.values()]
    return sources + [grammar for grammar, _ in BAD_GRAMMARS.values() if len(grammar) < 300]


TOKEN = re.compile(
    r'"(?:[^"\\\n]|\\.)*"|\[(?:[^]\\\n]|\\.)*\]|[a-zA-Z0-9-]+|\s+|::=|\{[^}]*\}|.', re.S
)
PIECES = [*'()|*+?"[]^-\\#.<!\0', "{2}", "{0,3}", "{9,}", "{2000}", "root", "::=", r"\x41"]
PIECES += [r"\u12", "é", "[]", "()", '[^"]', '""']


def mutated(seed: int) -> str:
    """A grammar that llama.cpp ships or our converter wrote, with a few random edits."""
    rng = random.Random(seed)
    tokens = TOKEN.findall(rng.choice(fuzz_sources()))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(tokens) + 1)
        n_removed = rng.choice((0, 0, 1, 1, 5))
        # Parts of the same grammar leave it more often valid than what belongs nowhere.
        new = rng.choice(tokens or PIECES) if rng.random() < 0.6 else rng.choice(PIECES)
        tokens[at : at + n_removed] = [new, " "] if rng.random() < 0.8 else [new[:-1]]
    return "".join(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_no_mutated_grammar_ends_the_process(part: int, tmp_path: Path) -> None:
    """Whatever passes the check is taken by llama.cpp, and can be sampled from."""
    base = pico.write_base(tmp_path / "base.gguf")
    code = FUZZ.format(
        paths=[str(Path(__file__).parent)],
        base=str(base),
        first=1000 * part,
        last=1000 * (part + 1),
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 100
