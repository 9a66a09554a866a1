"""Prompt and completion as token ids: together, those of the whole text."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest

from edgelora.datasets.records import Example, Message
from edgelora.engine.model import Model, open_model
from edgelora.engine.prepare import model_template, tokenise_examples


def ids_of(model: Model, template: str, prompt: str, completion: str) -> tuple[list[int], ...]:
    example = Example((Message("user", prompt),), completion, (completion,), 1)
    (found,) = tokenise_examples(model, model_template(model, template), [example])
    return list(found.prompt), list(found.completion)


@pytest.mark.parametrize("vocabulary", ["spm", "bpe"])
@pytest.mark.parametrize(
    ("template", "completion"),
    [
        ("Q: {prompt}\\nA:", " yes, it is"),
        ("Q: {prompt}\\n", "yes"),
        ("Q: {prompt}\\n", "\n\n yes"),
        ("[INST] {prompt} [/INST]", " yes \n"),
    ],
)
def test_a_completion_continues_the_text_of_the_prompt(
    tmp_path: Path, vocabulary: str, template: str, completion: str
) -> None:
    base = pico.write_base(tmp_path / "b.gguf", vocabulary=vocabulary)
    with open_model(base) as model:
        prompt_ids, completion_ids = ids_of(model, template, "is it", completion)
        text = template.replace("\\n", "\n").replace("{prompt}", "is it") + completion
        bos = [model.vocabulary.bos] if model.vocabulary.adds_bos else []
        expected = [*bos, *model.vocabulary.tokenize(text), model.vocabulary.eos]
        assert prompt_ids + completion_ids == expected


def test_after_a_control_token_a_text_begins_anew(tmp_path: Path) -> None:
    own = "{{ '<|im_start|>' + messages[0]['content'] + '<|im_end|>' }}"
    own += "{% if messages|length > 1 %}{{ messages[1]['content'] + '<|im_end|>' }}{% endif %}"
    with open_model(pico.write_base(tmp_path / "b.gguf")) as model:
        _, completion_ids = ids_of(model, own, "is it", "yes")
        end = model.vocabulary.control_ids["<|im_end|>"]
        assert completion_ids == [*model.vocabulary.tokenize("yes"), end]


def test_where_prompt_and_answer_would_be_one_token_the_answer_is_whole(tmp_path: Path) -> None:
    with open_model(pico.write_base(tmp_path / "b.gguf")) as model:
        vocabulary = model.vocabulary
        # " th" + "e" is one piece of this vocabulary.
        prompt_ids, completion_ids = ids_of(model, "{prompt} th", "is it", "e end")
        assert vocabulary.decode(completion_ids) == b"e end"
        assert vocabulary.decode(prompt_ids).strip() == b"is it th"
