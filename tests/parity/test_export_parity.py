"""Exported folders in what reads r and lora_alpha alone: PEFT without patterns, the converter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pico
import pytest
from hf_twin import hf_config, twin
from llama_logits import logits
from test_convert_parity import IDS, reference, torch_logits

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.adapters.merge import merge_adapters
from edgelora.adapters.peft import convert, write_peft

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a combination whose tensors have rank 4 or, in q and k, 6."""
    path = pico.write_base(tmp_path / "base.gguf", tied=False)
    base = read_base(path)
    for seed, modules in ((0, ("q_proj", "k_proj", "v_proj")), (1, ("q_proj", "k_proj"))):
        folder = pico.write_peft(tmp_path / f"{seed}", seed=seed, rank=4 - 2 * seed,
                                 modules=modules)  # fmt: skip
        convert(folder, base, tmp_path / f"{seed}.gguf", dtype="f32")
    sources = [tmp_path / "0.gguf", tmp_path / "1.gguf"]
    merge_adapters(sources, [0.7, -0.4], tmp_path / "both.gguf", method="cat", dtype="f32")
    return path, tmp_path / "both.gguf"


def test_one_rank_gives_the_same_logits_in_peft(made: tuple[Path, Path], tmp_path: Path) -> None:
    path, both = made
    assert len({open_lora(both).rank(name) for name in open_lora(both).names}) == 2
    write_peft(open_lora(both), read_base(path), tmp_path / "out", one_rank=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    model = peft.PeftModel.from_pretrained(
        twin(path, "llama", pico.dims_of("llama")), tmp_path / "out"
    )
    wanted = logits(path, IDS, both)
    assert np.abs(torch_logits(model) - wanted).max() < 1e-5 * np.ptp(wanted)
    assert np.abs(logits(path, IDS) - wanted).max() > 0.05 * np.ptp(wanted)


def test_the_converter_gives_the_file_back(made: tuple[Path, Path], tmp_path: Path) -> None:
    path, both = made
    (tmp_path / "config").mkdir()
    config = hf_config("llama", pico.dims_of("llama"), read_base(path).n_vocab, tied=False)
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    write_peft(open_lora(both), read_base(path), tmp_path / "out", one_rank=True)
    theirs = reference(tmp_path / "out", tmp_path / "config", tmp_path / "back.gguf", "f32")
    assert float(theirs["alpha"]) == 6.0
    for pair in open_lora(both).pairs():
        lora_a, lora_b = theirs[f"{pair.name}.lora_a"], theirs[f"{pair.name}.lora_b"]
        assert np.array_equal(lora_a[: pair.rank], pair.lora_a) and not lora_a[pair.rank :].any()
        assert np.array_equal(lora_b[:, : pair.rank], pair.lora_b)
        assert not lora_b[:, pair.rank :].any()
