"""mlx-lm folders to GGUF: values against plain numpy, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import Q, V, converted, delta, gguf_rows, refusal, save

from edgelora.adapters.base import Base


def write_mlx(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    save(folder / "adapters.safetensors", tensors)
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def mlx_factors(module: str, n_out: int, n_in: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        f"{module}.lora_a": rng.standard_normal((n_in, 4), dtype=np.float32),
        f"{module}.lora_b": rng.standard_normal((4, n_out), dtype=np.float32),
    }


def test_an_mlx_adapter(untied: Base, tmp_path: Path) -> None:
    embedding = mlx_factors("model.embed_tokens", 32, untied.n_vocab)
    query = mlx_factors(Q, 32, 32)
    lora = converted(write_mlx(tmp_path / "a", query | embedding), untied)
    assert lora.alpha == 80.0
    lora_a, lora_b = query.values()
    want = gguf_rows(20.0 * (lora_a @ lora_b).T, 4)
    assert np.allclose(delta(lora, "blk.0.attn_q.weight"), want, atol=1e-3)
    lora_a, lora_b = embedding.values()
    assert np.allclose(delta(lora, "token_embd.weight"), 20.0 * lora_a @ lora_b, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fine_tune_type": "dora"}, "'dora'"),
        ({"fine_tune_type": "full"}, "'full'"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale is None"),
        ({"lora_parameters": None}, "lora_parameters.scale is None"),
        ({"lora_parameters": {"scale": 10.0, "alpha": 16}}, "multiply differently"),
    ],
)
def test_mlx_configs_that_are_refused(
    config: dict[str, Any], words: str, base: Base, tmp_path: Path
) -> None:
    folder = write_mlx(tmp_path / "a", mlx_factors(Q, 32, 32), **config)
    assert words in str(refusal(folder, base))


def test_mlx_tensors_that_are_refused(base: Base, tmp_path: Path) -> None:
    tensors = mlx_factors(Q, 32, 32) | {f"{Q}.m": np.ones(32, np.float32)}
    tensors |= {f"{Q}.lora_a_scales": np.ones((1, 1), np.float32)}
    tensors |= dict([mlx_factors(V, 16, 32).popitem()])
    text = str(refusal(write_mlx(tmp_path / "a", tensors), base))
    assert "a DoRA magnitude" in text
    assert "lora_a_scales: neither" in text
    assert f"{V}: has lora_b only" in text
