"""The shipped vocabulary of Mistral is what the script makes; its ids are SentencePiece's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgelora.engine.vocabulary import open_vocabulary
from edgelora.shipped import shipped

pytestmark = pytest.mark.parity
ROOT = Path(__file__).parent.parent.parent
SHIPPED = shipped("catalogue") / "mistral-7b-v0.1.vocabulary.gguf"


@pytest.fixture
def model() -> Path:
    folder = Path(os.environ.get("EDGELORA_SHARED", "")) / "tokenizers"
    path = folder / "mistral-7b-v0.1.tokenizer.model"
    if not path.is_file():
        pytest.skip("needs tokenizers/ in the folder EDGELORA_SHARED")
    return path


def test_the_script_makes_the_shipped_bytes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.gguf"
    command = [sys.executable, str(ROOT / "scripts" / "make_vocabulary.py"), str(model), str(out)]
    options = ["--name", "Mistral 7B v0.1, vocabulary", "--licence", "Apache-2.0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32000 tokens" in done.stdout and out.read_bytes() == SHIPPED.read_bytes()
    again = subprocess.run([*command, *options], capture_output=True, text=True)
    assert again.returncode != 0 and "exists already" in again.stderr


def test_ids_equal_those_of_sentencepiece(model: Path) -> None:
    """This repository's own pages, and random pieces of the vocabulary in a row."""
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(model))
    texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))]
    texts = [paragraph for text in texts for paragraph in text.split("\n\n")]
    rng = np.random.default_rng(0)
    drawn = rng.integers(300, 32_000, (500, 12)).tolist()
    texts += [reference.decode(ids) for ids in drawn]
    with open_vocabulary(SHIPPED) as vocabulary:
        wrong = [text for text in texts if vocabulary.tokenize(text) != reference.encode(text)]
    assert len(texts) > 700 and wrong == []
