"""The script that makes files of a real shape, on a small shape; the merge benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from adapter_benchmark import results as adapter_results
from llama_logits import logits

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import check, open_lora
from edgelora.adapters.peft import convert
from edgelora.bank import open_bank
from edgelora.engine.model import open_model
from edgelora.engine.vocabulary import open_vocabulary
from edgelora.gguf_file import open_gguf
from edgelora.operators.distances import measure

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import make_shape

    small = make_shape.Shape(2, 64, 96, 4, 2, 400, 128)
    monkeypatch.setitem(make_shape.SHAPES, "small", small)
    return make_shape


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0", "q4_0"])
def test_a_base_decodes_and_takes_its_adapters(
    made: ModuleType, tmp_path: Path, dtype: str
) -> None:
    shape = made.SHAPES["small"]
    path = made.write_base(tmp_path / "base.gguf", shape, dtype=dtype)
    found = logits(path, [1, 300, 301])
    assert found.shape == (3, 400) and np.isfinite(found).all() and found.std() > 0
    lora = made.write_gguf_lora(tmp_path / "lora.gguf", shape, rank=4)
    assert check(open_lora(lora), read_base(path)) == []
    assert np.abs(logits(path, [1, 300, 301], lora) - found).max() > 0


def test_a_base_gets_the_tokenizer_of_a_file(made: ModuleType, tmp_path: Path) -> None:
    vocabulary = SCRIPTS.parent / "models" / "catalogue" / "mistral-7b-v0.1.vocabulary.gguf"
    shape = made.Shape(1, 64, 96, 4, 2, 32000, 128)
    path = made.write_base(tmp_path / "base.gguf", shape, vocabulary=vocabulary)
    with open_model(path) as model, open_vocabulary(vocabulary) as real:
        text = "Is this parcel late? It was sent on Monday."
        assert list(model.vocabulary.tokenize(text)) == list(real.tokenize(text))
        assert model.vocabulary.n_tokens == 32000
    with pytest.raises(SystemExit, match="400 tokens are needed, not 32000"):
        made.write_base(tmp_path / "b.gguf", made.SHAPES["small"], vocabulary=vocabulary)


def test_a_sparse_base_is_enough_to_convert(made: ModuleType, tmp_path: Path) -> None:
    shape = made.SHAPES["small"]
    sparse = made.write_base(tmp_path / "sparse.gguf", shape, dtype="f16", sparse=True)
    whole = made.write_base(tmp_path / "whole.gguf", shape, dtype="f16")
    assert open_gguf(sparse).tensors == open_gguf(whole).tensors
    assert sparse.stat().st_size == whole.stat().st_size
    assert read_base(sparse).identity == read_base(whole).identity
    folder = made.write_peft(tmp_path / "peft", shape, rank=4, dtype="F16")
    convert(folder, read_base(sparse), tmp_path / "lora.gguf")
    assert len(open_lora(tmp_path / "lora.gguf").names) == 6


def test_a_bank_goes_on_where_it_was(made: ModuleType, tmp_path: Path) -> None:
    shape = made.SHAPES["small"]
    base = made.write_base(tmp_path / "base.gguf", shape, dtype="f16", sparse=True)
    made.write_bank(tmp_path / "bank", shape, base, 1, rank=4)
    first = (tmp_path / "bank" / "adapters" / "random00000.gguf").stat().st_mtime_ns
    bank = open_bank(made.write_bank(tmp_path / "bank", shape, base, 3, rank=4))
    names = [record.name for record in bank.records()]
    assert names == ["random00000", "random00001", "random00002"]
    assert (tmp_path / "bank" / "adapters" / "random00000.gguf").stat().st_mtime_ns == first
    assert len({record.content_sha256 for record in bank.records()}) == 3
    base_id = read_base(base).identity.id
    signatures = [bank.signature(name, base_id) for name in names]
    distances = measure("bures", signatures[0], signatures)
    assert distances[0] < min(distances[1:]) and all(s.n_tokens == 64 * 40 for s in signatures)


def run_benchmark(name: str, results: Path, *more: object) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPTS / f"benchmark_{name}.py"), "--shape", "smollm2-135m"]
    command += [*map(str, more), "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == results.read_text(encoding="utf-8")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.slow
def test_the_merge_benchmark_runs(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    sizes = ["--adapters", 2, "--rank", 2, "--to", 2]
    told = run_benchmark("merge", results, tmp_path, *sizes)
    assert told["tensors"] == told["linear"]["tensors"] == 90
    assert 0 < told["error"] < told["linear"]["error"]
    table = adapter_results.report(adapter_results.read_rows(results))
    assert "| smollm2-135m | 2 of rank 2 to 2 |" in table


@pytest.mark.slow
def test_the_conversion_benchmark_runs(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    told = run_benchmark("convert", results, "--adapters", 2, "--workspace", tmp_path)
    assert told["adapters"] == 2 and told["seconds_each"] > 0 and told["anonymous_mb"] > 0
    assert "| smollm2-135m | 2 |" in adapter_results.report([told])


@pytest.mark.slow
def test_the_gradient_benchmark_makes_adapters_of_its_base(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base of another shape than the default, then adapters that are of neither."""
    base = made.write_base(tmp_path / "mine.gguf", made.SHAPES["small"], dtype="q8_0")
    command = [
        sys.executable, str(SCRIPTS / "benchmark_gradient.py"), str(tmp_path), "--base", str(base),
        "--adapters", "5", "--rank", "4", "--arms", "forward", "--shared-only",
        "--examples", "2", "--prefix", "4", "--own", "6",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| bank, shared |" in done.stdout
    adapter = tmp_path / "mine-r4-0.gguf"
    assert check(open_lora(adapter), read_base(base)) == []
    made.write_gguf_lora(adapter, made.Shape(2, 32, 96, 4, 2, 400, 128), rank=4)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{adapter}: not an adapter of {base}" in done.stderr
    assert "Traceback" not in done.stderr
