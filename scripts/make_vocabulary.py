"""Write a vocabulary-only GGUF, which llama.cpp tokenises with, from a SentencePiece model.

usage: python scripts/make_vocabulary.py TOKENIZER.model OUT.gguf --name NAME --licence SPDX

The pieces, their scores and types as llama.cpp's own converter writes them, and no tensor. The same
model gives the same bytes. Needs sentencepiece (pip install sentencepiece, or the extra `train`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from edgelora.files import publish, sha256_of


def main() -> None:
    """Read the model, write the vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a SentencePiece model")
    parser.add_argument("out", type=Path, help="the GGUF to write")
    parser.add_argument("--name", required=True, help="general.name of the file")
    parser.add_argument("--licence", required=True, help="of the model, an SPDX identifier")
    parser.add_argument("--force", action="store_true", help="overwrite")
    arguments = parser.parse_args()
    with publish(arguments.out, force=arguments.force) as temporary:
        n_tokens = write_vocabulary(
            arguments.model, temporary, name=arguments.name, licence=arguments.licence
        )
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {n_tokens} tokens, {size:.2f} MB, made from {arguments.model.name}")


def write_vocabulary(model: Path, out: Path, *, name: str, licence: str) -> int:
    """Write the vocabulary of a SentencePiece BPE model to `out`; the number of its tokens."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    ids = range(processor.vocab_size())
    writer = GGUFWriter(out, "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_license(licence)
    writer.add_description(f"SentencePiece model with SHA-256 {sha256_of(model)}")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types([_type(processor, i) for i in ids])
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return len(ids)


def _type(processor: Any, token: int) -> TokenType:
    if processor.is_unknown(token):
        return TokenType.UNKNOWN
    if processor.is_control(token):
        return TokenType.CONTROL
    if processor.is_unused(token):
        return TokenType.UNUSED
    return TokenType.BYTE if processor.is_byte(token) else TokenType.NORMAL


if __name__ == "__main__":
    main()
