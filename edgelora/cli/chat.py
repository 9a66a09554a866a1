"""`edgelora chat`: a conversation with the base and adapters in the terminal."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import console
from edgelora.cli.options import (
    check_templates,
    model_options,
    open_engine,
    show_template_warnings,
)
from edgelora.errors import EngineError, TemplateError

if TYPE_CHECKING:
    from edgelora.datasets.records import Message
    from edgelora.datasets.template import Template
    from edgelora.engine.context import Context
    from edgelora.engine.generate import Sampling

_BASE = "base"
_HELP = """\
/adapter         list the adapters
/adapter NAME    answer with this one from now on (base: with none)
/compare         answer the last question again with the base and with each adapter
/reset           forget the conversation
/quit            end, as Ctrl-D does, and Ctrl-C at the prompt
Ctrl-C in an answer stops that answer."""


@click.command()
@model_options
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A GGUF LoRA; repeatable, the first one answers.",
)
@click.option("--system", help="A system message that opens the conversation.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Of each answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option(
    "--context", "n_ctx", type=click.IntRange(min=64), default=4096, show_default=True,
    help="Tokens that a conversation may have.",
)  # fmt: skip
@console.common_options
@console.tells_memory
def command(
    base: str,
    adapters: tuple[Path, ...],
    template: str | None,
    low_ram: bool | None,
    system: str | None,
    n_ctx: int,
    threads: int,
    **options: Any,
) -> None:
    """Talk to the base with an adapter; /help lists what else can be typed."""
    from edgelora.engine.context import open_context
    from edgelora.engine.prepare import model_template

    with open_engine(base, threads, low_ram) as model:
        used = model_template(model, template)
        named = name_adapters(adapters)
        for path in adapters:
            model.adapter(path)
        check_templates(used.key, adapters)
        with open_context(model, n_ctx=n_ctx, n_sequences=1) as context:
            Chat(context, used, named, system, **options).run()


def name_adapters(paths: Sequence[Path]) -> dict[str, Path]:
    """A name to type for each file: its stem, or its whole path where stems collide."""
    stems = [path.stem for path in paths]
    return {
        str(path) if stems.count(path.stem) > 1 or path.stem == _BASE else path.stem: path
        for path in paths
    }


class Chat:
    """One conversation: its turns, and the adapter that answers."""

    def __init__(
        self,
        context: Context,
        template: Template,
        adapters: Mapping[str, Path],
        system: str | None,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        from edgelora.datasets.records import Message
        from edgelora.engine.generate import Sampling

        self._context = context
        self._template = template
        self._adapters = adapters
        self._opening = [Message("system", system)] if system else []
        self._max_tokens = max_tokens
        self._sampling: Sampling = Sampling(
            temperature=temperature, top_p=0.95, min_p=0.05, seed=seed
        )
        self._turns: list[Message] = []
        self._active = next(iter(adapters), _BASE)
        self._applied = ""
        self._seen_warnings: set[str] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._switch,
            "/compare": self._compare,
            "/reset": self._reset,
            "/help": lambda _: console.show(_HELP),
        }

    def run(self) -> None:
        """Read lines until /quit, the end of the input, or Ctrl-C at the prompt."""
        console.say(console.safe(f"answers: {self._active}; /help lists the commands"))
        while (line := _read_line()) is not None:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return
            if word in self._commands:
                self._commands[word](rest.strip())
            elif word.startswith("/"):
                console.warn(console.safe(f"no command {word}; /help lists them"))
            elif word:
                self._ask(line.strip())

    def _ask(self, question: str) -> None:
        from edgelora.datasets.records import Message

        asked = [*self._turns, Message("user", question)]
        answer = self._answer(asked, self._active)
        if answer is not None:
            self._turns = [*asked, Message("assistant", answer)]

    def _answer(self, turns: Sequence[Message], name: str) -> str | None:
        """Stream an answer to stdout; None (with a warning) where it cannot be made."""
        from edgelora.engine.model import WeightedAdapter

        if name != self._applied:  # what the context holds of this conversation stays, else
            path = self._adapters.get(name)
            self._context.apply([WeightedAdapter(path)] if path else [])
            self._applied = name
        try:
            prompt = self._prompt(turns)
            return self._stream(prompt)
        except (EngineError, TemplateError) as error:
            console.warn(console.safe(f"{error}\n/reset starts a new conversation"))
            return None

    def _prompt(self, turns: Sequence[Message]) -> list[int]:
        segments = self._template.render([*self._opening, *turns])
        show_template_warnings(self._template, self._seen_warnings)
        return self._context.model.vocabulary.tokenize_segments(segments)

    def _stream(self, prompt: Sequence[int]) -> str:
        from edgelora.engine.generate import stream

        # A conversation near the end of its context gets a shorter answer, and is told so below.
        n_room = min(self._max_tokens, max(1, self._context.n_ctx - len(prompt)))
        pieces: list[str] = []
        n_pieces = 0
        answer = stream(self._context, prompt, max_tokens=n_room, sampling=self._sampling)
        try:
            for piece in answer:
                n_pieces += 1
                pieces.append(piece)
                _write(piece)
        except KeyboardInterrupt:
            _write("\n")
            console.say("stopped")
            return "".join(pieces)
        _write("\n")
        if n_pieces > n_room:  # one for each token, and the decoder's rest
            why = "--max-tokens" if n_room == self._max_tokens else "the context is full; /reset"
            console.warn(f"cut after {n_room} tokens ({why})")
        return "".join(pieces)

    def _switch(self, name: str) -> None:
        known = [_BASE, *self._adapters]
        if name in known:
            self._active = name
            console.say(console.safe(f"answers: {name}"))
            return
        if name:
            console.warn(console.safe(f"no adapter {name} here"))
        for other in known:
            console.show(f"{'*' if other == self._active else ' '} {other}")

    def _compare(self, _: str) -> None:
        asked = self._turns[:-1]
        if not asked:
            console.warn("nothing to compare yet: ask something first")
            return
        for name in (_BASE, *self._adapters):
            console.show(f"--- {name}")
            self._answer(asked, name)

    def _reset(self, _: str) -> None:
        self._turns = []
        console.say("a new conversation")


def _read_line() -> str | None:
    """The next line; None at the end of the input and at Ctrl-C."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none; its console has a history
            importlib.import_module("readline")
    try:
        return input("> " if is_terminal else "")
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            _write("\n")
        return None


def _write(text: str) -> None:
    """A piece of an answer, at once; control characters of a model never reach the terminal."""
    click.echo(console.clean(text), nl=False)
