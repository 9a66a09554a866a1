"""Vocabularies without a model: the shipped one gives SentencePiece's ids, damaged ones none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
from gguf import GGUFWriter, TokenType

from edgelora.engine.model import open_model
from edgelora.engine.vocabulary import open_vocabulary
from edgelora.errors import InvalidFile, NotFound, UnsupportedFile
from edgelora.shipped import shipped

MISTRAL = shipped("catalogue") / "mistral-7b-v0.1.vocabulary.gguf"


def write(path: Path, change: dict[str, Any] | None = None) -> Path:
    """A vocabulary of the 256 bytes, three control tokens and `▁a`, with some entries changed."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a"]
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    entries: dict[str, Any] = {
        "model": "llama",
        "architecture": "llama",
        "tokens": tokens,
        "scores": [0.0] * len(tokens),
        "types": [*kinds, TokenType.NORMAL],
        "bos": 1,
    } | (change or {})
    writer = GGUFWriter(path, entries["architecture"])
    writer.add_tokenizer_model(entries["model"])
    writer.add_token_list(entries["tokens"])
    writer.add_token_scores(entries["scores"])
    writer.add_token_types(entries["types"])
    writer.add_bos_token_id(entries["bos"])
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_case_worked_by_hand(tmp_path: Path) -> None:
    with open_vocabulary(write(tmp_path / "v.gguf")) as vocabulary:
        assert vocabulary.n_tokens == 260
        # A space is put before the text: "▁a", then the two bytes of "é" (C3 A9).
        assert vocabulary.tokenize("aé") == [259, 3 + 0xC3, 3 + 0xA9]


def test_it_tokenises_as_the_whole_model_does(tmp_path: Path) -> None:
    path = pico.write_base(tmp_path / "b.gguf")
    text = "the cat is here, und <s> nicht dort\n\n 42"
    with open_vocabulary(path) as vocabulary, open_model(path) as model:
        assert vocabulary.tokenize(text) == model.vocabulary.tokenize(text)


def test_mistrals_ids_are_those_of_sentencepiece() -> None:
    """The ids were printed by SentencePiece from Mistral's tokenizer.model."""
    with open_vocabulary(MISTRAL) as vocabulary:
        assert (vocabulary.n_tokens, vocabulary.bos, vocabulary.eos) == (32_000, 1, 2)
        for text, ids in SENTENCEPIECE.items():
            assert vocabulary.tokenize(text) == ids, text


SENTENCEPIECE = {
    "The invoice shows the wrong VAT number.": [
        415, 1304, 9634, 4370, 272, 3544, 550, 962, 1474, 28723,
    ],
    "Ist das ein Apfel? – Nein, 3 Äpfel!": [
        25370, 2846, 1796, 4002, 20553, 28804, 764, 3147, 262, 28725, 28705, 28770, 18912, 10018,
        301, 28808,
    ],
    "def f(x):\n    return x ** 2\n": [
        801, 285, 28732, 28744, 1329, 13, 2287, 604, 1318, 619, 28705, 28750, 13,
    ],
    "  two  spaces ": [259, 989, 28705, 10599, 28705],
    "日本語 🙂": [28705, 29142, 29119, 30321, 28705, 29340],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"scores": [0.0] * 7}, "7 scores for 260 tokens"),
        ({"types": [1] * 7}, "7 token_type for 260 tokens"),
        ({"scores": [0] * 260}, "scores is not a list of float32"),
        ({"bos": 260}, "bos_token_id is 260, not a token"),
        ({"architecture": "qwen2"}, "architecture is not llama"),
        ({"tokens": [f"t{i}" for i in range(260)]}, "256 of the 256 byte tokens are missing"),
        ({"tokens": ["x"] * 260}, "259 tokens come twice"),
    ],
)
def test_a_vocabulary_that_would_end_the_process_is_refused(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(InvalidFile, match=problem),
        open_vocabulary(write(tmp_path / "v.gguf", change)),
    ):
        pass


def test_what_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound), open_vocabulary(tmp_path / "none.gguf"):
        pass
    bpe = pico.write_base(tmp_path / "b.gguf", "qwen2")
    with pytest.raises(UnsupportedFile, match="'gpt2', not llama"), open_vocabulary(bpe):
        pass
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(MISTRAL.read_bytes()[:100_000])
    with pytest.raises(InvalidFile, match="more than the file can hold"), open_vocabulary(cut):
        pass
