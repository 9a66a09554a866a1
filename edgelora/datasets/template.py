"""Messages to prompt text, with the template's own control tokens told apart from typed ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from edgelora.datasets.records import ROLES, Message
from edgelora.datasets.sandbox import Rendered, compile_template
from edgelora.datasets.segments import Guard, Segment, after, controls, cut, find_ending
from edgelora.errors import TemplateError

__all__ = ["NAMED", "Segment", "Template", "open_template"]

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

# The template as a function of the turns and whether to write the answer's opening.
Write = Callable[[Sequence[Message], bool], Rendered]


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
        turns = self._foldable(messages)
        return self._segments(turns, add_generation_prompt)

    def completion_segments(self, messages: Sequence[Message], completion: str) -> list[Segment]:
        """What follows `render(messages)`: the completion and the end token after it.

        It is what the template writes for an assistant turn after the prompt, up to the first
        control token behind its content; where the template writes none, EOS. A raw form takes
        the completion as it is, with no space added, and ends with EOS.

        Raises:
            TemplateError: as `render` does.
        """
        turns = self._foldable(messages)
        prompt = self._segments(turns, True)
        probed = self._segments([*turns, Message("assistant", _PROBE)], False)
        whole = self._segments([*turns, Message("assistant", completion)], False)
        probed_tail, tail = after(prompt, probed), after(prompt, whole)
        ending = find_ending(probed if probed_tail is None else probed_tail, _PROBE)
        end = (ending.end if ending else None) or self._eos
        ended = [Segment(end, True)] if end else []
        if tail is None or probed_tail is None or ending is None:
            self._warn("the template opens an answer otherwise than it writes one afterwards")
            return [Segment(completion, False), *ended]
        return [*cut(tail, ending), *ended]

    def _segments(self, turns: Sequence[Message], add_generation_prompt: bool) -> list[Segment]:
        """Render safely: the template's control tokens must not depend on what was typed."""
        rendered = self._guarded(turns, add_generation_prompt)
        if self._guard.is_safe(turn.content for turn in turns):
            return rendered
        neutral = [Message(t.role, "x" if t.content.strip() else t.content) for t in turns]
        if controls(rendered) == controls(self._guarded(neutral, add_generation_prompt)):
            return rendered
        # Either the template reads the content (sound), or it has glued pieces of it together
        # into a control token (an attack): then every piece that can begin one is broken too.
        return self._guarded(turns, add_generation_prompt, thorough=True)

    def _guarded(
        self, turns: Sequence[Message], add_generation_prompt: bool, *, thorough: bool = False
    ) -> list[Segment]:
        marks = self._guard.marks([self.source, *(turn.content for turn in turns)])
        broken = [
            Message(turn.role, self._guard.broken(turn.content, marks, thorough=thorough))
            for turn in turns
        ]
        rendered = self._write(broken, add_generation_prompt)
        if rendered.read_the_date:
            self._warn("the template writes today's date: results differ from day to day")
        return self._guard.split(rendered.text, marks)

    def _foldable(self, messages: Sequence[Message]) -> list[Message]:
        """Checked turns; a leading system turn joins the first user turn where it must."""
        turns = list(messages)
        unknown = sorted({turn.role for turn in turns} - set(ROLES))
        if unknown or not turns:
            raise TemplateError(f"unknown roles {unknown}" if unknown else "no messages to render")
        if turns[0].role != "system" or self._takes_system:
            return turns
        if len(turns) < 2 or turns[1].role != "user":
            raise TemplateError("a system message without a user turn after it")
        self._warn("the template has no system turn: the system message opens the user's first")
        folded = f"{turns[0].content}\n\n{turns[1].content}"
        return [Message("user", folded), *turns[2:]]

    def _probe_turns(self) -> bool:
        """Whether a system turn appears in the prompt; a user turn has to."""
        user = Message("user", _PROBE)
        if _PROBE not in self._write([user], True).text:
            raise TemplateError("the template drops the user's message", hint=_HINT)
        try:
            return self._write([Message("system", _PROBE), user], True).text.count(_PROBE) > 1
        except TemplateError:
            return False

    def _warn_of_plain_markers(self) -> None:
        if self.kind != "chat":
            return
        segments = self._segments([Message("user", _PROBE)], True)
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

    def write(turns: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        return template(
            messages=[{"role": turn.role, "content": turn.content} for turn in turns],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            bos_token=bos,
            eos_token=eos,
        )

    return write


def _raw_writer(source: str, bos: str, eos: str) -> Write:
    def write(turns: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        system, rest = "", turns
        if turns[0].role == "system":
            if "{system}" not in source:
                raise TemplateError("the raw template has no {system}")
            system, rest = turns[0].content, turns[1:]
        pieces = []
        for i, turn in enumerate(rest):
            if turn.role != ("user", "assistant")[i % 2]:
                raise TemplateError("a raw template takes turns of user, assistant, user, ...")
            if turn.role == "user":
                pieces.append(_filled(source, turn.content, system if i == 0 else ""))
            else:
                pieces.append(turn.content + eos)
        return Rendered("".join(pieces), False)

    return write


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


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text
