"""The tokeniser of a GGUF base as a folder of Hugging Face's, for clients that count tokens.

For byte-level BPE that takes each digit by itself, as SmolLM2's does.
"""

from __future__ import annotations

from pathlib import Path

from edgelora.gguf_file import open_gguf


def write_tokenizer(base: Path, folder: Path) -> Path:
    """Write the vocabulary, merges, control tokens and chat template of `base` into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    facts = open_gguf(base).metadata
    assert facts["tokenizer.ggml.pre"] == "smollm"
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    made.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL])
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=tokens[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[facts["tokenizer.ggml.eos_token_id"]],
        chat_template=facts["tokenizer.chat_template"],
    ).save_pretrained(folder)
    return folder


_CONTROL = 3
