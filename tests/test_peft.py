"""PEFT folders to GGUF: values against plain numpy, llama.cpp, and real adapters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
from folders import (
    Q,
    V,
    converted,
    delta,
    factors,
    gguf_rows,
    hollow_base,
    refusal,
    warned,
    write_folder,
)
from llama_logits import logits

from edgelora.adapters.base import Base, read_base
from edgelora.adapters.gguf_lora import check, open_lora
from edgelora.adapters.peft import convert
from edgelora.errors import UnsupportedFile
from edgelora.gguf_file import open_gguf

ALL = "q k v o gate up down qkv gate_up".split()
MODULES = [f"{name}_proj" for name in ALL] + ["c_attn", "c_proj", "c_fc"]


def test_one_matrix_by_hand(base: Base, tmp_path: Path) -> None:
    tensors = factors(Q, 32, 32)
    lora = converted(write_folder(tmp_path / "a", tensors), base)
    assert lora.names == ("blk.0.attn_q.weight",)
    assert lora.alpha == 8.0
    stored_a, stored_b = tensors.values()
    pair = lora.pair("blk.0.attn_q.weight")
    assert np.array_equal(pair.lora_a, stored_a)
    # The first head has rows 0..7; GGUF wants 0, 4, 1, 5, 2, 6, 3, 7.
    assert np.array_equal(pair.lora_b[:8], stored_b[[0, 4, 1, 5, 2, 6, 3, 7]])
    assert pair.scale == 2.0
    assert lora.metadata["edgelora.base.id"] == base.identity.id


@pytest.mark.parametrize("architecture", pico.ARCHITECTURES)
def test_every_module_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    path = pico.write_base(tmp_path / "b.gguf", architecture)
    base = read_base(path)
    tensors: dict[str, np.ndarray] = {}
    for i, (module, shape) in enumerate(pico.peft_modules(architecture).items()):
        tensors |= factors(module.format(1), *shape, seed=i)
    lora = converted(write_folder(tmp_path / "a", tensors), base)
    assert len(lora.names) == len(tensors) // 2
    for module in pico.peft_modules(architecture):
        prefix = f"base_model.model.{module.format(1)}"
        want = 2.0 * (tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"])
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            want = gguf_rows(want, 4 if module.endswith("q_proj") else 2)
        found = [name for name in lora.names if delta(lora, name).shape == want.shape]
        assert any(np.allclose(delta(lora, name), want, atol=1e-4) for name in found), module


@pytest.mark.parametrize("architecture", pico.ARCHITECTURES)
def test_llama_cpp_applies_what_was_converted(architecture: str, tmp_path: Path) -> None:
    """Hot-applied, the file gives the logits of a base whose weights hold the update."""
    path = pico.write_base(tmp_path / "b.gguf", architecture)
    config = {"alpha_pattern": {"layers.0.self_attn.v_proj": 3, "h.0.attn.c_attn": 5}}
    folder = pico.write_peft(tmp_path / "a", architecture, modules=MODULES, config=config)
    lora = converted(folder, read_base(path))
    merged = tmp_path / "merged.gguf"
    shutil.copy(path, merged)
    with merged.open("r+b") as file:
        for name in lora.names:
            gguf = open_gguf(path)
            file.seek(gguf.tensors[name].offset)
            file.write((gguf.array(name) + delta(lora, name)).astype("<f4").tobytes())
    ids = [5, 17, 30, 8, 99]
    want, got = logits(merged, ids), logits(path, ids, lora.path)
    tolerance = 2e-3 if architecture in ("gpt2", "gemma") else 1e-5
    assert np.abs(got - want).max() < tolerance * np.ptp(want)
    assert np.abs(got - logits(path, ids)).max() > 0.05 * np.ptp(want)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_output_types(dtype: str, base: Base, tmp_path: Path) -> None:
    tensors = factors(V, 16, 32)
    lora = converted(write_folder(tmp_path / "a", tensors), base, dtype=dtype)
    bits = {"f16": 11, "bf16": 8, "f32": 24}[dtype]
    stored_a, stored_b = tensors.values()
    pair = lora.pair("blk.1.attn_v.weight")
    assert np.allclose(pair.lora_a, stored_a, rtol=2.0**-bits, atol=1e-6)
    assert np.allclose(pair.lora_b, stored_b, rtol=2.0**-bits, atol=1e-6)


def test_f16_is_the_default(base: Base, tmp_path: Path) -> None:
    convert(write_folder(tmp_path / "a", factors(V, 16, 32)), base, tmp_path / "a.gguf")
    types = {info.ggml_type.name for info in open_gguf(tmp_path / "a.gguf").tensors.values()}
    assert types == {"F16"}


def test_q8_0_needs_a_rank_of_32(base: Base, tmp_path: Path) -> None:
    wide = write_folder(tmp_path / "w", factors(V, 16, 32, rank=32), {"r": 32})
    assert delta(converted(wide, base, dtype="q8_0"), "blk.1.attn_v.weight").shape == (16, 32)
    narrow = write_folder(tmp_path / "n", factors(V, 16, 32))
    with pytest.raises(UnsupportedFile, match="multiples of 32"):
        convert(narrow, base, tmp_path / "n.gguf", dtype="q8_0")


def test_f16_and_bf16_sources(base: Base, tmp_path: Path) -> None:
    tensors = factors(V, 16, 32)
    half = {name: values.astype(np.float16) for name, values in tensors.items()}
    stored_a, stored_b = converted_pair(write_folder(tmp_path / "h", half), base)
    assert np.array_equal(stored_a, next(iter(half.values())).astype(np.float32))
    bits = {k: (v.view(np.uint32) >> 16).astype(np.uint16) for k, v in tensors.items()}
    stored_a, stored_b = converted_pair(write_folder(tmp_path / "b", bits), base)
    for stored, values in zip((stored_a, stored_b), tensors.values(), strict=True):
        assert np.array_equal(stored.view(np.uint32), values.view(np.uint32) & 0xFFFF0000)


def converted_pair(folder: Path, base: Base) -> tuple[np.ndarray, np.ndarray]:
    pair = converted(folder, base).pair("blk.1.attn_v.weight")
    return np.array(pair.lora_a), np.array(pair.lora_b)


def test_mixed_ranks_keep_one_alpha(base: Base, tmp_path: Path) -> None:
    tensors = factors(Q, 32, 32, rank=2) | factors(V, 16, 32, rank=4)
    folder = write_folder(tmp_path / "a", tensors, {"rank_pattern": {"q_proj": 2}})
    lora = converted(folder, base)
    assert lora.alpha == 8.0
    assert lora.pair("blk.0.attn_q.weight").scale == 4.0
    assert lora.pair("blk.1.attn_v.weight").scale == 2.0


def test_a_rank_that_the_config_does_not_know(base: Base, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", factors(V, 16, 32, rank=2))
    lora, messages = warned(folder, base)
    assert "has rank 2, adapter_config.json says 4" in messages
    many = pico.write_peft(tmp_path / "many", rank=2, config={"r": 4})
    assert "and 3 more warnings" in warned(many, base)[1]
    assert lora.pair("blk.1.attn_v.weight").scale == 4.0


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 4.0),
        ({"use_rslora": True, "alpha_pattern": {"v_proj": 2}}, 1.0),
        ({"alpha_pattern": {"q_proj": 4, "v_proj": 2}}, 0.5),
    ],
)
def test_other_scales_are_baked(
    config: dict[str, Any], scale: float, base: Base, tmp_path: Path
) -> None:
    tensors = factors(V, 16, 32) | factors(Q, 32, 32)
    lora = converted(write_folder(tmp_path / "a", tensors, config), base)
    assert lora.alpha == 0.0
    stored_a, stored_b = list(tensors.values())[:2]
    assert np.array_equal(lora.pair("blk.1.attn_v.weight").lora_a, stored_a)
    assert np.array_equal(lora.pair("blk.1.attn_v.weight").lora_b, stored_b * np.float32(scale))


def test_one_alpha_from_a_pattern_needs_no_baking(base: Base, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", factors(V, 16, 32), {"alpha_pattern": {"v_proj": 2}})
    assert converted(folder, base).alpha == 2.0


def test_alpha_zero_is_not_llama_cpps_scale_one(base: Base, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", factors(V, 16, 32), {"lora_alpha": 0})
    lora, messages = warned(folder, base)
    assert "changes nothing" in messages
    assert not delta(lora, "blk.1.attn_v.weight").any()


def test_two_alpha_patterns_for_one_module(base: Base, tmp_path: Path) -> None:
    config = {"alpha_pattern": {"self_attn.v_proj": 4, "v_proj": 2}}
    lora, messages = warned(write_folder(tmp_path / "a", factors(V, 16, 32), config), base)
    assert "several patterns" in messages
    assert lora.alpha == 4.0


def test_an_adapter_that_changes_nothing(base: Base, tmp_path: Path) -> None:
    tensors = factors(V, 16, 32)
    tensors[list(tensors)[1]][:] = 0.0
    folder = write_folder(tmp_path / "a", tensors)
    assert "changes nothing" in warned(folder, base)[1]
    with pytest.warns(UserWarning, match="changes nothing"):
        convert(folder, base, tmp_path / "b.gguf")


def test_names_with_an_adapter_and_without_a_prefix(base: Base, tmp_path: Path) -> None:
    want = converted_pair(write_folder(tmp_path / "a", factors(V, 16, 32)), base)
    named = write_folder(tmp_path / "n", factors(V, 16, 32, infix=".default"))
    assert all(map(np.array_equal, converted_pair(named, base), want))
    bare = {k.removeprefix("base_model.model."): v for k, v in factors(V, 16, 32).items()}
    assert all(map(np.array_equal, converted_pair(write_folder(tmp_path / "b", bare), base), want))


def test_two_adapters_in_one_file(base: Base, tmp_path: Path) -> None:
    tensors = factors(V, 16, 32, infix=".one") | factors(V, 16, 32, infix=".two")
    error = refusal(write_folder(tmp_path / "a", tensors), base)
    assert "expected one A and one B" in str(error)


def test_untargeted_modules_are_left_out_aloud(base: Base, tmp_path: Path) -> None:
    tensors = factors(V, 16, 32) | factors(Q, 32, 32)
    config = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
    lora, messages = warned(write_folder(tmp_path / "a", tensors, config), base)
    assert lora.names == ("blk.1.attn_v.weight",)
    assert "not targeted" in messages
    assert Q in messages
    config = {"target_modules": "nothing"}
    assert "holds no LoRA" in str(refusal(write_folder(tmp_path / "b", tensors, config), base))


def test_embedding_and_head_of_an_untied_base(untied: Base, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((4, untied.n_vocab), dtype=np.float32)
    second = rng.standard_normal((32, 4), dtype=np.float32)
    prefix = "base_model.model.model.embed_tokens"
    tensors = {f"{prefix}.lora_embedding_A": first, f"{prefix}.lora_embedding_B": second}
    tensors |= factors("lm_head", untied.n_vocab, 32)
    tensors[f"{prefix}.base_layer.weight"] = np.zeros((untied.n_vocab, 32), np.float32)
    lora, messages = warned(write_folder(tmp_path / "a", tensors), untied)
    assert lora.names == ("token_embd.weight", "output.weight")
    assert np.allclose(delta(lora, "token_embd.weight"), 2.0 * (second @ first).T, atol=1e-4)
    assert "copy of the base's own weights" in messages
    assert np.isfinite(logits(untied.path, [5, 17, 30], lora.path)).all()


def test_the_same_input_gives_the_same_bytes(base: Base, tmp_path: Path) -> None:
    folder = pico.write_peft(tmp_path / "a", modules=MODULES)
    convert(folder, base, tmp_path / "1.gguf")
    convert(folder, base, tmp_path / "2.gguf")
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


# ---- adapters found in public (../shared/adapters)


def shared(*parts: str) -> Path:
    root = os.environ.get("EDGELORA_SHARED")
    if not root:
        pytest.skip("EDGELORA_SHARED does not name the folder of shared test material")
    return Path(root, *parts)


TINY_LLAMA = pico.Dims(2048, 5632, 22, 32, 4, 64, 2048)
GPT2 = pico.Dims(768, 3072, 12, 12, 12, 64, 1024)


@pytest.mark.parametrize(
    ("name", "architecture", "dims", "n_pairs"),
    [
        ("arona_ckpt75", "llama", TINY_LLAMA, 44),
        ("arona_ckpt180", "llama", TINY_LLAMA, 44),
        ("gpt2_mycguo", "gpt2", GPT2, 36),
        ("gpt2_abrhaley", "gpt2", GPT2, 36),
    ],
)
def test_real_adapters(
    name: str, architecture: str, dims: pico.Dims, n_pairs: int, tmp_path: Path
) -> None:
    folder = shared("adapters", "good", name)
    base = read_base(hollow_base(tmp_path / "b.gguf", architecture, dims, 32000))
    convert(folder, base, tmp_path / "a.gguf")
    lora = open_lora(tmp_path / "a.gguf")
    assert len(lora.names) == n_pairs
    assert not check(lora, base)


@pytest.mark.parametrize("name", ["lfs_pointer_mistral_VjayRam", "lfs_pointer_mistral_go"])
def test_real_lfs_pointers(name: str, base: Base) -> None:
    assert "Git LFS pointer" in str(refusal(shared("adapters", "bad", name), base))
