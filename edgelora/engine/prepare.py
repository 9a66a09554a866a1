"""Examples and a template to token ids, by one rule for scoring, embedding and chat."""

from __future__ import annotations

from collections.abc import Sequence

from edgelora.datasets.read import Example
from edgelora.datasets.template import Template, open_template
from edgelora.engine.model import Model
from edgelora.engine.score import TokenisedExample


def model_template(model: Model, override: str | None = None) -> Template:
    """The base's own chat template, or `override` (a raw form, a jinja text, a file, a name).

    Raises:
        TemplateError: the base has none and `override` is None.
    """
    vocabulary = model.vocabulary
    return open_template(
        model.base.chat_template,
        override,
        bos=vocabulary.text_of(vocabulary.bos),
        eos=vocabulary.text_of(vocabulary.eos),
        control_tokens=model.control_tokens,
    )


def tokenise_examples(
    model: Model, template: Template, examples: Sequence[Example]
) -> list[TokenisedExample]:
    """Prompt and completion of each example as the template renders them.

    The completion ends with the end token that the template writes after an answer; an example
    without a completion gets none.
    """
    return [_tokenise(model, template, example) for example in examples]


def _tokenise(model: Model, template: Template, example: Example) -> TokenisedExample:
    prompt = model.vocabulary.tokenize_segments(template.render(example.messages))
    completion: list[int] = []
    if example.completion is not None:
        segments = template.completion_segments(example.messages, example.completion)
        completion = model.vocabulary.tokenize_segments(segments, start=False)
    return TokenisedExample(tuple(prompt), tuple(completion), example.line)
