"""lm-eval's local-completions: a multiple-choice task scored as the engine scores it directly.

On an F32 copy of the base with F32 keys and values. On quantised weights a log-likelihood moves by
0.1 with the shape of the batch that it is computed in, which lm-eval and the server choose: there
neither it nor the choice that it decides could be compared exactly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_process import ADAPTER, held_out, serve
from tokenizer import write_tokenizer

from edgelora import bases
from edgelora.datasets.records import Message
from edgelora.engine.context import open_context
from edgelora.engine.model import ModelOptions, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template
from edgelora.engine.quantize import quantize
from edgelora.engine.score import TokenisedExample, score

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

N_LINES, N_CHOICES = 16, 4
Doc = dict[str, Any]


@pytest.fixture(scope="module")
def docs() -> list[Doc]:
    """Held-out lines; the wrong choices are the items of the three lines after each."""
    lines = held_out(N_LINES)
    items = [line["completion"] for line in lines]
    made = []
    for i, line in enumerate(lines):
        wrong = [items[(i + step) % N_LINES] for step in range(1, N_CHOICES)]
        answer = i % N_CHOICES
        choices = [*wrong[:answer], items[i], *wrong[answer:]]
        made.append({"prompt": line["prompt"], "choices": choices, "answer": answer})
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2 with F32 weights."""
    path = tmp_path_factory.mktemp("f32") / "smollm2-f32.gguf"
    quantize(bases.resolve("smollm2-135m-instruct"), path, "f32")
    yield path
    path.unlink()  # half a gigabyte


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, docs: list[Doc], base: Path) -> Path:
    """The task and the tokeniser, as a person would write them down for lm-eval."""
    folder = tmp_path_factory.mktemp("lm-eval")
    lines = folder / "returns.jsonl"
    lines.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": "returns",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(lines)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "returns.yaml").write_text(json.dumps(task))  # JSON is YAML
    write_tokenizer(base, folder / "tokenizer")
    return folder


def directly(base: Path, docs: list[Doc], adapters: list[WeightedAdapter]) -> np.ndarray:
    """Log-likelihoods of every choice by the engine, (lines, choices)."""
    with (
        open_model(base, ModelOptions()) as model,
        open_context(model, n_ctx=512, n_sequences=4, exact=True) as context,
    ):
        context.apply(adapters)
        template, vocabulary = model_template(model), model.vocabulary
        examples = []
        for doc in docs:
            segments = template.render([Message("user", doc["prompt"])])
            prompt = vocabulary.tokenize_segments(segments)
            # lm-eval counts the white space at the end of a prompt as the answer's.
            assert vocabulary.decode(prompt[-1:]) == b"\n"
            for choice in doc["choices"]:
                answer = [prompt[-1], *vocabulary.tokenize(choice)]
                examples.append(TokenisedExample(tuple(prompt[:-1]), tuple(answer)))
        scores = score(context, examples)
    return -np.array([each.nll for each in scores]).reshape(len(docs), -1)


def by_lm_eval(url: str, model: str, folder: Path) -> tuple[float, np.ndarray]:
    """Accuracy, and the log-likelihoods of every choice, of `lm-eval run`."""
    output = folder / model
    arguments = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(folder / "tokenizer"),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 2,
        "max_length": 512,
    }
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
            "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items()),
            "--tasks", "returns", "--include_path", str(folder), "--batch_size", "4",
            "--apply_chat_template", "--log_samples", "--output_path", str(output),
        ],
        capture_output=True, text=True, timeout=280,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1",
             "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_returns_*.jsonl")
    told = [json.loads(line) for line in samples.read_text().splitlines()]
    told.sort(key=lambda sample: sample["doc_id"])
    rows = [[float(resp[0][0]) for resp in sample["resps"]] for sample in told]
    accuracy = json.loads(results.read_text())["results"]["returns"]["acc,none"]
    return accuracy, np.array(rows)


def test_accuracy_and_log_likelihoods_are_the_engines(
    base: Path, docs: list[Doc], folder: Path
) -> None:
    options = ("--slots", "4", "--context", "512", "--kv-type", "f32")
    accuracies, alone = {}, {}
    with serve("--base", str(base), "--adapter", str(ADAPTER), *options) as server:
        for model, adapters in ((base.stem, []), (ADAPTER.stem, [WeightedAdapter(ADAPTER)])):
            accuracies[model], told = by_lm_eval(server.url, model, folder)
            alone[model] = directly(base, docs, adapters)
            assert np.abs(told - alone[model]).max() < 1e-3
            right = alone[model].argmax(axis=1) == [doc["answer"] for doc in docs]
            assert accuracies[model] == pytest.approx(right.mean(), abs=1e-9)
    # Far above chance, and the adapter's scores are its own.
    assert min(accuracies.values()) > 0.5
    assert np.abs(alone[base.stem] - alone[ADAPTER.stem]).max() > 0.1
