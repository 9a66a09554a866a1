"""Merging against PEFT: cat by logits and by weights, svd by weights (right from 0.21.2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pico
import pytest
import torch
from hf_twin import twin
from llama_logits import logits

from edgelora.adapters.base import read_base
from edgelora.adapters.combine import COMBINATIONS
from edgelora.adapters.gguf_lora import open_lora
from edgelora.adapters.merge import merge_adapters
from edgelora.adapters.peft import convert, write_peft

# transformers and torch warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

IDS = [5, 17, 30, 8, 99, 120, 44, 7, 7, 210, 33]
MODULES = ["q_proj", "k_proj", "v_proj", "down_proj"]
CONFIGS = {"one": {"r": 4, "lora_alpha": 8}, "two": {"r": 6, "lora_alpha": 3}}


def two_adapters(base: Path, folder: Path) -> tuple[peft.PeftModel, list[Path]]:
    """The model of transformers with two random adapters, and both as GGUF."""
    model = twin(base, "llama", pico.dims_of("llama"))
    config = {name: peft.LoraConfig(**c, target_modules=MODULES) for name, c in CONFIGS.items()}
    tuned = peft.get_peft_model(model, config["one"], adapter_name="one")
    tuned.add_adapter("two", config["two"])
    torch.manual_seed(0)
    for name, values in tuned.named_parameters():
        if "lora_" in name:
            values.data = torch.randn_like(values) / values.shape[-1] ** 0.5
    tuned.save_pretrained(folder)
    paths = []
    for name in CONFIGS:
        paths.append(folder / f"{name}.gguf")
        convert(folder / name, read_base(base), paths[-1], dtype="f32")
    return tuned, paths


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """The dense update of each module of a saved PEFT adapter."""
    from safetensors.numpy import load_file

    config = peft.LoraConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    return {
        name: (config.lora_alpha / tensors[f"{name}.lora_A.weight"].shape[0])
        * (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"])
        for name in names
    }


@pytest.mark.parametrize("weights", [[0.7, 0.4], [0.7, -0.4]])
def test_cat_is_pefts_cat(tmp_path: Path, weights: list[float]) -> None:
    base = pico.write_base(tmp_path / "base.gguf", "llama", tied=False)
    tuned, paths = two_adapters(base, tmp_path)
    tuned.add_weighted_adapter(["one", "two"], weights, "mixed", combination_type="cat")
    tuned.set_adapter("mixed")
    with torch.no_grad():
        wanted = tuned(torch.tensor([IDS])).logits[0].numpy()
    merged = tmp_path / "merged.gguf"
    merge_adapters(paths, weights, merged, method="cat", dtype="f32")
    found = logits(base, IDS, merged)
    assert np.abs(found - wanted).max() < 1e-4 * (wanted.max() - wanted.min())
    assert np.abs(logits(base, IDS) - wanted).max() > 0.01 * (wanted.max() - wanted.min())


@pytest.mark.parametrize("method", [m for m in COMBINATIONS if m != "linear"])
def test_updates_equal_pefts(tmp_path: Path, method: str) -> None:
    """Our file, exported back to PEFT, against PEFT's own combination, matrix by matrix."""
    base = pico.write_base(tmp_path / "base.gguf", "llama")
    tuned, paths = two_adapters(base, tmp_path)
    options = {"svd_rank": 3} if method == "svd" else {}
    tuned.add_weighted_adapter(
        ["one", "two"], [0.7, 0.4], "mixed", combination_type=method, **options
    )
    tuned.save_pretrained(tmp_path / "peft", selected_adapters=["mixed"])
    rank = 3 if method == "svd" else "auto"
    merge_adapters(paths, [0.7, 0.4], tmp_path / "m.gguf", method=method, rank=rank, dtype="f32")
    write_peft(open_lora(tmp_path / "m.gguf"), read_base(base), tmp_path / "ours")
    theirs, ours = deltas(tmp_path / "peft" / "mixed"), deltas(tmp_path / "ours")
    assert sorted(theirs) == sorted(ours)
    for name, wanted in theirs.items():
        np.testing.assert_allclose(ours[name], wanted, atol=2e-5 * np.abs(wanted).max())
