"""Examples and a template to token ids, by one rule for scoring, embedding and chat."""

from __future__ import annotations

from collections.abc import Sequence

from edgelora.datasets.read import Example
from edgelora.datasets.template import Segment, Template, open_template
from edgelora.engine.model import Model
from edgelora.engine.score import TokenisedExample
from edgelora.engine.tokens import Vocabulary


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
    rendered = template.render(example.messages)
    prompt = model.vocabulary.tokenize_segments(rendered)
    completion: list[int] = []
    if example.completion is not None:
        answer = template.completion_segments(example.messages, example.completion)
        completion = _continue(model.vocabulary, rendered, answer)
    return TokenisedExample(tuple(prompt), tuple(completion), example.line)


def _continue(
    vocabulary: Vocabulary, prompt: Sequence[Segment], answer: Sequence[Segment]
) -> list[int]:
    """Ids of the answer as the rest of one text: by itself, SentencePiece would begin it with a
    space that the template did not write.

    Where the last piece of the prompt and the first of the answer would become one token, the
    answer follows a newline instead: the model has to begin it anew.
    """
    for before in (list(prompt), [Segment("\n", False)]):
        ids = vocabulary.tokenize_segments(before, start=False)
        whole = vocabulary.tokenize_segments(_joined(before, answer), start=False)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
    return vocabulary.tokenize_segments(answer, start=False)


def _joined(first: Sequence[Segment], second: Sequence[Segment]) -> list[Segment]:
    """Both, with the two plain texts where they meet as one."""
    if not first or not second or first[-1].control or second[0].control:
        return [*first, *second]
    return [*first[:-1], Segment(first[-1].text + second[0].text, False), *second[1:]]
