"""The Neural head: numpy against torch, the Gram trick against the plain loss, the script's run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from pico import write_base, write_peft

from edgelora.adapters.base import read_base
from edgelora.bank.opening import open_bank
from edgelora.operators.distances import BANDWIDTHS, multiscale_mmd
from edgelora.operators.heads import neural
from edgelora.operators.neural import load_heads, mlp, tabulate
from edgelora.signature import summarise

pytestmark = pytest.mark.parity
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "train_neural.py"
    spec = importlib.util.spec_from_file_location("train_neural", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_neural"] = module
    spec.loader.exec_module(module)
    return module


def test_numpys_mlp_equals_torchs(script: ModuleType) -> None:
    torch.manual_seed(0)
    model = script.make_mlp(300)
    z = np.linspace(-7, 7, 200)
    with torch.no_grad():
        expected = model(torch.tensor(z, dtype=torch.float32)[:, None])[:, 0].numpy()
    weights = script.weights_of(model)
    assert mlp(z, weights) == pytest.approx(expected, abs=1e-5)
    grid_error = np.interp(z, np.linspace(-32, 32, 8_193), tabulate(weights)) - expected
    assert np.abs(grid_error).max() < 1e-3 * np.ptp(expected)


def test_the_gram_gives_the_plain_loss_and_its_gradient(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    adapters = torch.tensor(rng.normal(size=(6, 500)))
    coefficients = torch.softmax(torch.tensor(rng.normal(size=(6, 6))), dim=1).requires_grad_()
    plain = torch.nn.functional.mse_loss(coefficients @ adapters, adapters)
    ours = script.mean_squared_error(coefficients, adapters @ adapters.T, 500)
    assert ours.item() == pytest.approx(plain.item())
    (expected,) = torch.autograd.grad(plain, coefficients)
    (found,) = torch.autograd.grad(ours, coefficients)
    assert found.numpy() == pytest.approx(expected.numpy())


def test_training_lowers_the_loss_and_repeats(script: ModuleType) -> None:
    rng = np.random.default_rng(1)
    centres = np.repeat(rng.normal(size=(3, 40)), 4, axis=0)
    adapters = centres + 0.3 * rng.normal(size=(12, 40))
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    z = script.scaled_rows(distances, True)
    recipe = script.Recipe(hidden=64, steps=30, lr=1e-2)
    first, second = (script.train(z, adapters @ adapters.T, 40, recipe) for _ in range(2))
    assert first.losses[-1] < 0.8 * first.losses[0]
    assert first.losses == second.losses


def test_mmd_equals_the_papers_torch_formulas_on_the_same_draw() -> None:
    rng = np.random.default_rng(2)
    x, y = (np.minimum(rng.zipf(1.2, size=1_000) * 7, 31_999).astype(np.int64) for _ in range(2))
    a, b = torch.tensor(x[None]), torch.tensor(y[None])
    total = 0.0
    for left, right, weight in ((a, a, 1.0), (b, b, 1.0), (a, b, -2.0)):
        squares = (left * left).T + right * right  # int64, as there
        gaps = squares - 2.0 * torch.mm(left.T, right)  # float32
        assert gaps.dtype == torch.float32
        for width in BANDWIDTHS:
            total += weight * (width**2 / (width**2 + gaps)).double().mean().item()
    assert multiscale_mmd(x, y) == pytest.approx(total, abs=2e-6)


def test_the_script_writes_a_head_that_numpy_runs(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base_path = write_base(tmp_path / "base.gguf", "llama")
    base = read_base(base_path)
    bank = open_bank(tmp_path / "bank", create=True)
    rng = np.random.default_rng(3)
    for i in range(6):
        folder = tmp_path / f"task{i}"
        write_peft(folder, "llama", seed=i)
        bank.add(folder, base)
        if i < 5:
            x = rng.normal(size=(9, 8)).astype(np.float32)
            ids = rng.integers(0, 50, size=(9, 6)).tolist()
            identity = base.identity.id
            signature = summarise(x, None, ids, n_vocab=base.n_vocab, base_id=identity)
            bank.set_signature(f"task{i}", signature)
    arguments = [str(bank.path), "--distance", "js", "--hidden", "32", "--steps", "5"]
    assert script.main(arguments) == 0
    captured = capsys.readouterr()
    assert "js: 5 steps, hidden 32, 4 of 5 adapters" in captured.out
    assert "task5: skipped" in captured.err
    assert script.main([*arguments[:2], "wd", *arguments[3:], "--without-diagonal"]) == 0
    data = (bank.path / "neural.safetensors").read_bytes()
    heads = load_heads(data)
    assert {name: head.diagonal for name, head in heads.items()} == {"js": True, "wd": False}
    assert neural([0.3, 0.2, 0.7], head=heads["js"]).sum() == pytest.approx(1.0)
    assert len(data) < 70_000
    assert script.main([str(tmp_path / "nowhere")]) == 1
