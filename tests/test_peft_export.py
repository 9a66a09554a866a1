"""A GGUF LoRA back to PEFT: the same factors, ranks and scales as before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pico
import pytest
from folders import factors, write_folder
from safetensors.numpy import load_file

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.adapters.peft import convert, read_adapter, write_peft
from edgelora.errors import AlreadyExists, IncompatibleAdapter

V = "model.layers.1.self_attn.v_proj"


def load(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("architecture", pico.ARCHITECTURES)
def test_there_and_back_gives_the_same_tensors(architecture: str, tmp_path: Path) -> None:
    base = read_base(pico.write_base(tmp_path / "b.gguf", architecture))
    modules = [path.rsplit(".", 1)[1] for path in pico.peft_modules(architecture)]
    folder = pico.write_peft(tmp_path / "a", architecture, modules=modules)
    convert(folder, base, tmp_path / "a.gguf", dtype="f32")
    write_peft(open_lora(tmp_path / "a.gguf"), base, tmp_path / "back", base_model="me/model")
    before, after = load(folder), load(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    config = config_of(tmp_path / "back")
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == "me/model"
    assert config["fan_in_fan_out"] == (architecture == "gpt2")
    assert config["target_modules"] == sorted(
        path.format(0).split(".0.", 1)[1] for path in pico.peft_modules(architecture)
    )


def test_mixed_ranks_and_baked_scales(tmp_path: Path) -> None:
    base = read_base(pico.write_base(tmp_path / "b.gguf"))
    tensors = factors(V, 16, 32, rank=2) | factors("model.layers.0.mlp.up_proj", 64, 32, rank=4)
    config = {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"v_proj": 2}}
    convert(write_folder(tmp_path / "a", tensors, config), base, tmp_path / "a.gguf", dtype="f32")
    lora = open_lora(tmp_path / "a.gguf")
    write_peft(lora, base, tmp_path / "back")
    config = config_of(tmp_path / "back")
    assert config["target_modules"] == ["model.layers.0.mlp.up_proj", V]
    again = {pair.name: pair for pair in read_adapter(tmp_path / "back", base).pairs()}
    assert again.keys() == set(lora.names)
    for pair in lora.pairs():
        assert again[pair.name].scale == pair.scale == 1.0
        assert np.array_equal(again[pair.name].lora_b, pair.lora_b)


def test_embedding_and_half_precision(tmp_path: Path) -> None:
    base = read_base(pico.write_base(tmp_path / "b.gguf", tied=False))
    prefix = "base_model.model.model.embed_tokens"
    rng = np.random.default_rng(0)
    tensors = {
        f"{prefix}.lora_embedding_A": rng.standard_normal((4, base.n_vocab)).astype(np.float16),
        f"{prefix}.lora_embedding_B": rng.standard_normal((32, 4)).astype(np.float16),
    }
    tensors |= {k: v.astype(np.float16) for k, v in factors("lm_head", base.n_vocab, 32).items()}
    convert(write_folder(tmp_path / "a", tensors), base, tmp_path / "a.gguf")
    write_peft(open_lora(tmp_path / "a.gguf"), base, tmp_path / "back")
    after = load(tmp_path / "back")
    assert after.keys() == tensors.keys()
    assert all(np.array_equal(after[name], values) for name, values in tensors.items())
    assert all(values.dtype == np.float16 for values in after.values())
    assert config_of(tmp_path / "back")["target_modules"] == ["model.embed_tokens", "lm_head"]


def test_what_is_refused(tmp_path: Path) -> None:
    base = read_base(pico.write_base(tmp_path / "b.gguf"))
    lora = open_lora(pico.write_random_lora(tmp_path / "a.gguf", base.path))
    write_peft(lora, base, tmp_path / "back")
    with pytest.raises(AlreadyExists):
        write_peft(lora, base, tmp_path / "back")
    write_peft(lora, base, tmp_path / "back", force=True)
    other = read_base(pico.write_base(tmp_path / "o.gguf", dims=pico.Dims(n_embd=64)))
    with pytest.raises(IncompatibleAdapter):
        write_peft(lora, other, tmp_path / "other")
    foreign = pico.write_base(tmp_path / "f.gguf", "qwen2")
    foreign_lora = open_lora(pico.write_random_lora(tmp_path / "fa.gguf", foreign))
    with pytest.raises(IncompatibleAdapter):
        write_peft(foreign_lora, base, tmp_path / "other")
    assert not (tmp_path / "other").exists()
