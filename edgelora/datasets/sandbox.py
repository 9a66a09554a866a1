"""Chat templates are programs from a stranger's file: jinja2's sandbox, with a budget of work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor
from jinja2.exceptions import SecurityError

from edgelora.errors import TemplateError

MAX_SOURCE_CHARS = 256 * 1024
MAX_OUTPUT_CHARS = 8 * 1024 * 1024
MAX_LOOP_STEPS = 1_000_000

# All but ASCII and the private use areas of Unicode.
_ESCAPABLE = re.compile("[^\0-\x7f\ue000-\uf8ff\U000f0000-\U0010ffff]")

# What template code can raise besides jinja2's own errors.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclass
class _Budget:
    loop_steps: int = MAX_LOOP_STEPS
    read_the_date: bool = False


_BUDGET: ContextVar[_Budget] = ContextVar("edgelora_template_budget")


@dataclass(frozen=True)
class Rendered:
    """A rendering's text, and whether it depends on today's date."""

    text: str
    read_the_date: bool


def compile_template(source: str) -> Callable[..., Rendered]:
    """Compile a chat template as transformers does; the result takes its variables as keywords.

    Bounded: the length of the source and the output, the steps of all loops together, and the
    length of texts made by `+`, `~` and `*`. Not bounded: padding filters such as `center`, and
    formats with a huge width.

    Raises:
        TemplateError: from here if the source is too long or has a syntax error, from the result
            if the template raises, fails or exceeds its budget.
    """
    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateError(f"the chat template has {len(source)} characters: too long")
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    try:
        tree = _Counted().visit(environment.parse(source))
        template = environment.from_string(tree)
    except _FAILURES as error:
        raise TemplateError(f"the chat template has an error: {_said(error)}") from error
    return lambda **variables: _render(template, variables)


def _render(template: jinja2.Template, variables: dict[str, object]) -> Rendered:
    budget = _Budget()
    token = _BUDGET.set(budget)
    pieces, length = [], 0
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT_CHARS:
                raise TemplateError("the chat template writes too much")
    except _FAILURES as error:
        what = f"the chat template cannot render these messages: {_said(error)}"
        raise TemplateError(what) from error
    finally:
        _BUDGET.reset(token)
    return Rendered("".join(pieces), budget.read_the_date)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What transformers gives to a chat template, with lengths checked before they are made."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["tojson"] = _to_json
        self.filters["edgelora_counted"] = _counted
        self.filters["edgelora_joined"] = _joined
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: object, right: object
    ) -> object:
        _refuse_growth(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _Counted(jinja2.visitor.NodeTransformer):
    """Every loop runs over a counted iterator, and every `~` is checked like `+`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "edgelora_counted", node.lineno)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        items = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return _filtered(items, "edgelora_joined", node.lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filtered(node: jinja2.nodes.Node, name: str, lineno: int) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=lineno)


def _counted(items: Iterable[object]) -> Iterator[object]:
    budget = _BUDGET.get()
    for item in items:
        budget.loop_steps -= 1
        if budget.loop_steps < 0:
            raise SecurityError("its loops take too many steps")
        yield item


def _joined(items: list[object]) -> str:
    texts = [str(item) for item in items]
    if sum(map(len, texts)) > MAX_OUTPUT_CHARS:
        raise SecurityError("it makes too long a text")
    return "".join(texts)


def _refuse_growth(operator: str, left: object, right: object) -> None:
    length = 0
    if operator == "*":
        length = max(_length(left) * _count(right), _length(right) * _count(left))
    elif operator == "+":
        length = _length(left) + _length(right)
    elif operator == "**":
        length = _count(left).bit_length() * _count(right)
    elif isinstance(left, str) and re.search(r"\d{5}|\*", left):
        length = MAX_OUTPUT_CHARS + 1
    if length > MAX_OUTPUT_CHARS:
        raise SecurityError("it makes too long a value")


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _count(value: object) -> int:
    return abs(value) if isinstance(value, int) else 0


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja2's own filter, which escapes HTML's characters. The marks that keep control strings
    # apart (`Guard`) must stay characters, so those are never escaped.
    text = json.dumps(
        value,
        ensure_ascii=False,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return _ESCAPABLE.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _raise_exception(message: object) -> str:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    _BUDGET.get().read_the_date = True
    return datetime.now().strftime(form)


def _said(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text[:300]} (line {line})" if line else text[:300]
