"""Messages to prompt text, with the template's own control tokens told apart from typed ones."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora.datasets.conversation import (
    PROBE_TOOL,
    Turn,
    change_tools,
    change_turn,
    texts_in,
    tools_of,
    turn_of,
    turns_of,
    with_short_ids,
)
from edgelora.datasets.records import ROLES, Message
from edgelora.datasets.sandbox import Rendered, compile_template
from edgelora.datasets.segments import Guard, Segment, after, controls, cut, find_ending
from edgelora.errors import TemplateError

__all__ = ["NAMED", "Segment", "Template", "is_template_text", "open_template"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
SNI = "Definition: {instruction}\n\nNow complete the following example -\nInput: {input}\nOutput:"
NAMED = {"chatml": CHATML, "alpaca": ALPACA, "sni": SNI}

_PROBE = "\uf8ff"
_FIELD = re.compile(r"\{(prompt|instruction|input|system)\}")
_MARKER = re.compile(r"\[/?[A-Z][A-Z_]*\]|<<?/?[|\uff5c]?[A-Za-z_][^<>\s]{0,40}?[|\uff5c]?>>?")
_HINT = "Give another with --template: chatml, alpaca, sni, a file, or a text with {prompt} in it."

# The template as a function of the turns, the tools, and whether to write the answer's opening.
Tools = Sequence[Turn] | None
Write = Callable[[Sequence[Turn], Tools, bool], Rendered]


class Template:
    """A prompt template bound to a vocabulary's control tokens; made by `open_template`.

    Attributes:
        kind: "chat" (a jinja chat template) or "raw" (a text with `{prompt}`).
        source: the template's text.
        key: what adapters record and templates are compared by: "chat" for the base's own chat
            template, otherwise the text.
        control_tokens: every control string of the vocabulary.
    """

    def __init__(
        self,
        kind: str,
        source: str,
        control_tokens: Iterable[str],
        *,
        key: str | None = None,
        bos: str = "",
        eos: str = "",
    ) -> None:
        self.kind = kind
        self.source = source
        self.key = source if key is None else key
        self.control_tokens = frozenset(control_tokens) | {bos, eos} - {""}
        self._eos = eos
        self._guard = Guard(self.control_tokens)
        self._write: Write = _WRITERS[kind](source, bos, eos)
        self._warnings: dict[str, None] = {}
        self._takes_system = self._probe_turns()
        self._warn_of_plain_markers()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, so far: some warnings arise while rendering."""
        return tuple(self._warnings)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The prompt as segments; their texts joined are the plain rendering, byte for byte.

        A control string inside a message is text, whatever the message says: before rendering it
        is broken by a private-use character, the template is rendered with that, the result is
        split at control strings (which only the template can have written), and the private-use
        characters are taken out again. So filters such as `trim` act as in a plain rendering.
        Not covered: markers that are ordinary text in the vocabulary (see `warnings`).

        Raises:
            TemplateError: unknown roles, no messages, or turns that the template refuses.
        """
        turns = self._foldable(self._checked(messages))
        return self._segments(turns, add_generation_prompt)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment]:
        """The prompt of a conversation in OpenAI's form, as `render` gives it.

        What `render` says of contents holds for every string of the request: names, ids,
        arguments and their keys, the tools' descriptions and schemas. A template that takes no
        tools (`takes_tools`) leaves them out, and may refuse the role "tool".

        Raises:
            TemplateError: as `render` does, and for arguments that are no JSON object.
        """
        turns = self._foldable(turns_of(messages))
        given = tools_of(tools)
        try:
            return self._segments(turns, True, given)
        except TemplateError:
            if not any("tool_call_id" in turn or "tool_calls" in turn for turn in turns):
                raise
            return self._segments(with_short_ids(turns), True, given)

    def answer_segments(
        self,
        messages: Sequence[Mapping[str, Any]],
        answer: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment] | None:
        """What follows `render_chat(messages, tools)` when `answer` is the assistant's turn.

        None where the template opens an answer otherwise than it writes one afterwards.

        Raises:
            TemplateError: as `render_chat` does.
        """
        turns, given = self._foldable(turns_of(messages)), tools_of(tools)
        prompt = self._segments(turns, True, given)
        whole = self._segments([*turns, *turns_of([answer])], False, given)
        return after(prompt, whole)

    @functools.cached_property
    def takes_tools(self) -> bool:
        """Whether the template writes the tools that it is given."""
        user = {"role": "user", "content": "x"}
        try:
            text = self._write([user], [PROBE_TOOL], True).text
        except TemplateError:
            return False
        return str(PROBE_TOOL["function"]["name"]) in text

    def completion_segments(self, messages: Sequence[Message], completion: str) -> list[Segment]:
        """What follows `render(messages)`: the completion and the end token after it.

        It is what the template writes for an assistant turn after the prompt, up to the first
        control token behind its content; where the template writes none, EOS. A raw form takes
        the completion as it is, with no space added, and ends with EOS.

        Raises:
            TemplateError: as `render` does.
        """
        turns = self._foldable(self._checked(messages))
        prompt = self._segments(turns, True)
        probed = self._segments([*turns, _assistant(_PROBE)], False)
        whole = self._segments([*turns, _assistant(completion)], False)
        probed_tail, tail = after(prompt, probed), after(prompt, whole)
        ending = find_ending(probed if probed_tail is None else probed_tail, _PROBE)
        end = (ending.end if ending else None) or self._eos
        ended = [Segment(end, True)] if end else []
        if tail is None or probed_tail is None or ending is None:
            self._warn("the template opens an answer otherwise than it writes one afterwards")
            return [Segment(completion, False), *ended]
        return [*cut(tail, ending), *ended]

    def _segments(
        self, turns: Sequence[Turn], add_generation_prompt: bool, tools: Tools = None
    ) -> list[Segment]:
        """Render safely: the template's control tokens must not depend on what was typed."""
        rendered = self._guarded(turns, tools, add_generation_prompt)
        if self._guard.is_safe(_typed(turns, tools)):
            return rendered
        neutral = self._guarded(
            [change_turn(turn, self._neutral) for turn in turns],
            change_tools(tools, self._neutral),
            add_generation_prompt,
        )
        if controls(rendered) == controls(neutral):
            return rendered
        # Either the template reads the content (sound), or it has glued pieces of it together
        # into a control token (an attack): then every piece that can begin one is broken too.
        return self._guarded(turns, tools, add_generation_prompt, thorough=True)

    def _neutral(self, text: str) -> str:
        return "x" if text.strip() and not self._guard.is_safe([text]) else text

    def _guarded(
        self,
        turns: Sequence[Turn],
        tools: Tools,
        add_generation_prompt: bool,
        *,
        thorough: bool = False,
    ) -> list[Segment]:
        marks = self._guard.marks([self.source, *_typed(turns, tools)])

        def broken(text: str) -> str:
            return self._guard.broken(text, marks, thorough=thorough)

        rendered = self._write(
            [change_turn(turn, broken) for turn in turns],
            change_tools(tools, broken),
            add_generation_prompt,
        )
        if rendered.read_the_date:
            self._warn("the template writes today's date: results differ from day to day")
        return self._guard.split(rendered.text, marks)

    def _checked(self, messages: Sequence[Message]) -> list[Turn]:
        unknown = sorted({message.role for message in messages} - set(ROLES))
        if unknown or not messages:
            raise TemplateError(f"unknown roles {unknown}" if unknown else "no messages to render")
        return [turn_of(message) for message in messages]

    def _foldable(self, turns: list[Turn]) -> list[Turn]:
        """The turns; those of the system that lead join the first user turn where they must."""
        n_system = next((i for i, t in enumerate(turns) if t["role"] != "system"), len(turns))
        if n_system == 0 or self._takes_system:
            return turns
        if n_system == len(turns) or turns[n_system]["role"] != "user":
            raise TemplateError("a system message without a user turn after it")
        self._warn("the template has no system turn: the system message opens the user's first")
        content = "\n\n".join(turn["content"] for turn in turns[: n_system + 1])
        return [{**turns[n_system], "content": content}, *turns[n_system + 1 :]]

    def _probe_turns(self) -> bool:
        """Whether a system turn appears in the prompt; a user turn has to."""
        user = {"role": "user", "content": _PROBE}
        if _PROBE not in self._write([user], None, True).text:
            raise TemplateError("the template drops the user's message", hint=_HINT)
        system = {"role": "system", "content": _PROBE}
        try:
            return self._write([system, user], None, True).text.count(_PROBE) > 1
        except TemplateError:
            return False

    def _warn_of_plain_markers(self) -> None:
        if self.kind != "chat":
            return
        segments = self._segments([{"role": "user", "content": _PROBE}], True)
        text = "\0".join(segment.text for segment in segments if not segment.control)
        markers = list(dict.fromkeys(_MARKER.findall(text)))
        if markers:
            named = ", ".join(markers[:6]) + (", ..." if len(markers) > 6 else "")
            self._warn(
                f"the template's {named} are ordinary text in this vocabulary: "
                "a message can imitate them, and nothing can prevent it"
            )

    def _warn(self, text: str) -> None:
        self._warnings[text] = None


def open_template(
    base_chat_template: str | None,
    override: str | None,
    bos: str,
    eos: str,
    control_tokens: Iterable[str],
) -> Template:
    """The template to use: `override` if given, otherwise the base's own chat template.

    `override` is "chat" (the base's), a name in NAMED, a text, or a file that holds one. A text
    is a jinja chat template if it contains `{{` or `{%`, otherwise a raw form: it contains
    `{prompt}` (or `{instruction}` and `{input}`, the prompt before and after its first blank
    line), and may contain `{system}`. In a raw form of a single line `\\n` stands for a newline.

    Raises:
        TemplateError: no template at all (names --template), an unknown name, an unreadable
            file, a raw form without `{prompt}`, or a template that cannot render a user turn.
    """
    own = base_chat_template if base_chat_template and base_chat_template.strip() else None
    if override is None or override == "chat":
        if own is None:
            raise TemplateError("the base has no chat template", hint=_HINT)
        return Template("chat", own, control_tokens, key="chat", bos=bos, eos=eos)
    source = _resolved(override)
    kind = "chat" if _is_jinja(source) else "raw"
    key = "chat" if source == own else source
    return Template(kind, source, control_tokens, key=key, bos=bos, eos=eos)


def _chat_writer(source: str, bos: str, eos: str) -> Write:
    template = compile_template(source)

    def write(turns: Sequence[Turn], tools: Tools, add_generation_prompt: bool) -> Rendered:
        return template(
            messages=list(turns),
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=None,
            bos_token=bos,
            eos_token=eos,
        )

    return write


def _raw_writer(source: str, bos: str, eos: str) -> Write:
    def write(turns: Sequence[Turn], _tools: Tools, _opening: bool) -> Rendered:
        system, rest = "", turns
        if turns[0]["role"] == "system":
            if "{system}" not in source:
                raise TemplateError("the raw template has no {system}")
            system, rest = turns[0]["content"], turns[1:]
        pieces = []
        for i, turn in enumerate(rest):
            if turn["role"] != ("user", "assistant")[i % 2]:
                raise TemplateError("a raw template takes turns of user, assistant, user, ...")
            if turn["role"] == "user":
                pieces.append(_filled(source, turn["content"], system if i == 0 else ""))
            else:
                pieces.append(turn["content"] + eos)
        return Rendered("".join(pieces), False)

    return write


def _assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}


def _typed(turns: Sequence[Turn], tools: Tools) -> Iterator[str]:
    """Every string of a request that a template may write; a turn's role is not typed."""
    for turn in turns:
        yield from texts_in([value for key, value in turn.items() if key != "role"])
    yield from texts_in(tools)


_WRITERS: dict[str, Callable[[str, str, str], Write]] = {"chat": _chat_writer, "raw": _raw_writer}


def _filled(source: str, prompt: str, system: str) -> str:
    instruction, _, text = prompt.partition("\n\n")
    fields = {"prompt": prompt, "instruction": instruction, "input": text, "system": system}
    return _FIELD.sub(lambda match: fields[match[1]], source)


def _resolved(override: str) -> str:
    text = NAMED.get(override, override)
    if not _is_jinja(text) and not _FIELD.search(text):
        text = _file_text(override)
    if _is_jinja(text):
        return text
    if not re.search(r"\{(prompt|input)\}", text):
        raise TemplateError("the raw template has no {prompt}", hint=_HINT)
    return text if "\n" in text else text.replace("\\n", "\n")


def _file_text(name: str) -> str:
    try:
        # An editor's last newline is not part of the form; jinja drops it too.
        return Path(name).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, ValueError) as error:
        what = f"{name[:200]!r} is no template's name, no text with {{prompt}} and no readable file"
        raise TemplateError(what, hint=_HINT) from error


def is_template_text(text: str) -> bool:
    """Whether `open_template` takes this text itself as a template, and not as a name."""
    return _is_jinja(text) or re.search(r"\{(prompt|input)\}", text) is not None


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text
