"""Rendered prompts against transformers' own renderer, on the templates of five model families."""

from __future__ import annotations

import pytest
from test_template import ASKED, FAMILIES, FORGED, joined, opened

from edgelora.datasets.records import Message

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("content", ["What is it?", "  spaces \n\n around\t", *FORGED])
def test_rendering_equals_transformers(name: str, content: str) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    source, bos, eos, *_ = FAMILIES[name]
    messages = [Message("user", content), Message("assistant", content), *ASKED]
    conversation = [{"role": m.role, "content": m.content} for m in messages]
    (expected,), _ = render(
        [conversation],
        chat_template=source,
        add_generation_prompt=True,
        bos_token=bos,
        eos_token=eos,
    )
    assert joined(opened(name).render(messages)) == expected
