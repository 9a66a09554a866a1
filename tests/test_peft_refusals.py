"""Adapter folders that are refused: one error with every problem, each named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pico
import pytest
from folders import Q, V, converted, factors, hollow_base, refusal, write_folder

from edgelora.adapters.base import Base, read_base
from edgelora.adapters.peft import convert
from edgelora.errors import (
    EdgeLoRAError,
    IncompatibleAdapter,
    InvalidFile,
    NotFound,
    UnsupportedFile,
)


def test_all_problems_of_a_file_in_one_error(base: Base, tmp_path: Path) -> None:
    tensors = (
        factors(V, 16, 32) | factors(Q, 48, 32) | factors("model.layers.7.mlp.up_proj", 64, 32)
    )
    tensors |= factors("model.layers.0.mlp.experts.0.w1", 8, 8)
    tensors[next(iter(tensors))][0, 0] = np.nan
    prefix = "base_model.model.model.layers.0"
    tensors |= {
        "base_model.model.score.weight": np.ones((2, 32), np.float32),
        f"{prefix}.self_attn.q_proj.lora_magnitude_vector": np.ones(32, np.float32),
        f"{prefix}.self_attn.v_proj.lora_B.bias": np.ones(16, np.float32),
        f"{prefix}.self_attn.o_proj.lora_A.weight": np.ones((4, 32), np.float32),
        f"{prefix}.input_layernorm.weight": np.ones(32, np.float32),
        "base_model.model.lm_head.modules_to_save.weight": np.ones(32, np.float32),
        "base_model.model.model.embed_tokens.weight": np.ones((9, 32), np.float32),
        "other": np.ones(3, np.float32),
    }
    error = refusal(write_folder(tmp_path / "a", tensors, {"use_dora": True}), base)
    assert isinstance(error, UnsupportedFile)
    text = str(error)
    for words in (
        "use_dora", "classification head", "DoRA magnitude", "lora_bias", "modules_to_save",
        "expected one A and one B", "trained norm", "saved whole", "other: no LoRA factor",
        "NaN or infinite", "updates a 48 x 32 matrix, the base's is 32 x 32",
        "blk.7.ffn_up.weight: the base has no such", "experts.0.w1: unknown module",
    ):  # fmt: skip
        assert words in text, words
    assert len(error.problems) == 13


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_not_finite(
    value: float, dtype: type[np.floating], base: Base, tmp_path: Path
) -> None:
    tensors = {name: values.astype(dtype) for name, values in factors(V, 16, 32).items()}
    list(tensors.values())[1][3, 2] = value
    error = refusal(write_folder(tmp_path / "a", tensors), base)
    assert isinstance(error, InvalidFile)
    assert "lora_B.weight: holds NaN or infinite" in str(error)


def test_values_too_large_for_f16(base: Base, tmp_path: Path) -> None:
    tensors = factors(V, 16, 32)
    next(iter(tensors.values()))[0, 0] = 70000.0
    folder = write_folder(tmp_path / "a", tensors)
    with pytest.raises(EdgeLoRAError, match="too large for f16"):
        convert(folder, base, tmp_path / "a.gguf")
    assert converted(folder, base, dtype="f32").pair("blk.1.attn_v.weight").lora_a[0, 0] == 70000


def test_another_models_shapes(tmp_path: Path, base: Base) -> None:
    folder = pico.write_peft(tmp_path / "a", dims=pico.Dims(n_embd=64, head_dim=16))
    error = refusal(folder, base)
    assert isinstance(error, IncompatibleAdapter)
    assert len(error.problems) == 6


def test_factors_that_do_not_pair(base: Base, tmp_path: Path) -> None:
    names = list(factors(V, 16, 32))
    shapes = {"ranks": ((4, 32), (16, 2)), "vector": ((4, 32), (16,)), "none": ((0, 32), (16, 0))}
    words = {"ranks": "lora_a has rank 4, lora_b 2", "vector": "not matrices", "none": "rank is 0"}
    for case, found in shapes.items():
        pair = (np.ones(shape, np.float32) for shape in found)
        tensors = dict(zip(names, pair, strict=True))
        assert words[case] in str(refusal(write_folder(tmp_path / case, tensors), base))


def test_a_type_that_is_not_read(base: Base, tmp_path: Path) -> None:
    tensors = {name: values.astype(np.float64) for name, values in factors(V, 16, 32).items()}
    assert "F64 is none of F32, F16, BF16" in str(
        refusal(write_folder(tmp_path / "a", tensors), base)
    )


def test_embedding_and_head_of_a_tied_base(base: Base, tmp_path: Path) -> None:
    prefix = "base_model.model.model.embed_tokens"
    tensors = {
        f"{prefix}.lora_embedding_A": np.ones((4, base.n_vocab), np.float32),
        f"{prefix}.lora_embedding_B": np.ones((32, 4), np.float32),
    }
    error = refusal(write_folder(tmp_path / "a", tensors | factors("lm_head", 9, 32)), base)
    assert isinstance(error, UnsupportedFile)
    assert "model.embed_tokens: this base ties" in str(error)
    assert "lm_head: this base ties" in str(error)


def test_a_resized_embedding(untied: Base, tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = factors(V, 16, 32) | {name: np.zeros((untied.n_vocab + 2, 32), np.float32)}
    assert "of another size" in str(refusal(write_folder(tmp_path / "a", tensors), untied))


def test_an_architecture_that_is_not_on_the_list(tmp_path: Path) -> None:
    path = hollow_base(tmp_path / "b.gguf", "falcon", pico.Dims(), 100)
    error = refusal(write_folder(tmp_path / "a", factors(V, 16, 32)), read_base(path))
    assert isinstance(error, UnsupportedFile)
    assert "'falcon' is not supported (llama, qwen2" in str(error)


def test_folders_that_hold_no_adapter(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert isinstance(refusal(folder, base), NotFound)
    folder.mkdir()
    assert "adapter_config.json" in str(refusal(folder, base))
    (folder / "adapter_config.json").write_text("{")
    assert "not JSON" in str(refusal(folder, base))
    (folder / "adapter_config.json").write_text("[]")
    assert "not a JSON object" in str(refusal(folder, base))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    assert "adapter_model.safetensors" in str(refusal(folder, base))
    (folder / "adapter_model.bin").write_bytes(b"")
    assert "pickle" in str(refusal(folder, base))


def test_a_truncated_file_and_a_bad_config_together(base: Base, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", factors(V, 16, 32), {"use_dora": True})
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    text = str(refusal(folder, base))
    assert "truncated" in text
    assert "use_dora" in text
