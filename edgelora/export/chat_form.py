"""A chat template as texts around the turns, and those as a template of Go and of jinja.

What other programs run is not our renderer: a Go template in Ollama, llama.cpp's own jinja. Both
get a form with no logic but the turns' roles, made by looking at what our template writes.
Not covered: tools; system turns that do not lead; trimming of white space around contents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.datasets.records import Message
from edgelora.datasets.template import Template
from edgelora.errors import UnsupportedFile

_SYSTEM, _USER, _ANSWER, _NEXT = (chr(code) for code in range(0xE100, 0xE104))
# No text of a turn may change what is written around it: blank lines, braces, digits.
_CONVERSATIONS = tuple(
    tuple(Message(role, text) for role, text in turns)
    for turns in (
        (("user", "One {x}.\n\nTwo: 2?"),),
        (("system", "Be brief.\n\nA: {prompt}"), ("user", "One\n\nTwo")),
        (("user", "a"), ("assistant", "b\n\nc"), ("user", "d"), ("assistant", "e"), ("user", "f")),
        (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c\n\nd")),
    )
)


@dataclass(frozen=True)
class ChatForm:
    """What a template writes around the turns of every conversation; BOS is not in it.

    Attributes:
        opening: before the first user turn where no system turn leads.
        before_system, after_system: around a leading system turn; the user's follows.
        after_user: behind each user turn; the answer is generated after it.
        before_answer: between that and an earlier answer.
        after_answer: between an answer and the user turn that follows it.
    """

    opening: str
    before_system: str
    after_system: str
    after_user: str
    before_answer: str
    after_answer: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for a conversation that ends with a user turn."""
        pieces = []
        for i, message in enumerate(messages):
            before = {"system": self.before_system, "assistant": self.before_answer}
            after = {"system": self.after_system, "user": self.after_user}
            opening = "" if i else self.opening
            pieces.append(before.get(message.role, opening) + message.content)
            pieces.append(after.get(message.role, self.after_answer))
        return "".join(pieces)


def find_form(template: Template, bos: str) -> ChatForm:
    """The form that writes what `template` does.

    Args:
        bos: BOS where the vocabulary adds it by itself, else ""; the form leaves it out.

    Raises:
        UnsupportedFile: there is none, because the template looks into the turns.
        TemplateError: the template refuses a conversation.
    """

    def written(*turns: tuple[str, str]) -> str:
        return _text(template, [Message(role, text) for role, text in turns], bos)

    alone = written(("user", _USER)).split(_USER)
    led = re.split(f"[{_SYSTEM}{_USER}]", written(("system", _SYSTEM), ("user", _USER)))
    whole = written(("user", _USER), ("assistant", _ANSWER), ("user", _NEXT))
    parts = re.split(f"[{_USER}{_ANSWER}{_NEXT}]", whole)
    if (len(alone), len(led), len(parts)) != (2, 3, 4) or not parts[1].startswith(alone[1]):
        raise _unsupported(template)
    form = ChatForm(
        opening=alone[0],
        before_system=led[0],
        after_system=led[1],
        after_user=alone[1],
        before_answer=parts[1].removeprefix(alone[1]),
        after_answer=parts[2],
    )
    if any(form.render(turns) != _text(template, turns, bos) for turns in _CONVERSATIONS):
        raise _unsupported(template)
    return form


def to_go(form: ChatForm) -> str:
    """The form as a template of Go's text/template over Ollama's `.Messages`."""
    text = {name: _go_text(value) for name, value in vars(form).items()}
    return (
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "system" }}'
        f"{text['before_system']}{{{{ .Content }}}}{text['after_system']}"
        '{{ else if eq .Role "user" }}'
        f"{{{{ if eq $i 0 }}}}{text['opening']}{{{{ end }}}}{{{{ .Content }}}}{text['after_user']}"
        '{{ else if eq .Role "assistant" }}'
        f"{text['before_answer']}{{{{ .Content }}}}"
        f"{{{{ if not $last }}}}{text['after_answer']}{{{{ end }}}}"
        "{{ end }}{{ end }}"
    )


def to_jinja(form: ChatForm) -> str:
    """The form as a jinja chat template of one line."""
    text = {name: json.dumps(value, ensure_ascii=False) for name, value in vars(form).items()}
    content = "message['content']"
    return (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        f"{{{{ {text['before_system']} + {content} + {text['after_system']} }}}}"
        "{% elif message['role'] == 'user' %}"
        f"{{% if loop.first %}}{{{{ {text['opening']} }}}}{{% endif %}}"
        f"{{{{ {content} + {text['after_user']} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {text['before_answer']} + {content} }}}}"
        f"{{% if not loop.last %}}{{{{ {text['after_answer']} }}}}{{% endif %}}"
        "{% endif %}{% endfor %}"
    )


def _text(template: Template, turns: Sequence[Message], bos: str) -> str:
    return "".join(segment.text for segment in template.render(turns)).removeprefix(bos)


def _go_text(text: str) -> str:
    """Text that Go's templates and Ollama's Modelfile take as it is.

    A brace that could open an action, a quote that could end the value, and characters that
    Ollama's parser drops are written as Go strings.
    """
    text = re.sub(r'\{(?=\{|$)|"(?="|$)', lambda match: _action(match[0]), text)
    return "".join(c if c.isprintable() or c in "\n\t" else _action(c) for c in text)


def _action(character: str) -> str:
    code = ord(character)
    escaped = f"\\U{code:08x}" if character not in '"{' else {'"': '\\"', "{": "{"}[character]
    return f'{{{{ "{escaped}" }}}}'


def _unsupported(template: Template) -> UnsupportedFile:
    shown = " ".join(template.source.split())[:200]
    return UnsupportedFile(
        "the prompt template looks into the turns, so it is no text around them that another "
        "program could be given",
        problems=[f"the template: {shown}"],
        hint="Serve it with `edgelora serve`, or send prompts that are rendered already.",
    )
