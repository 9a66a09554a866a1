"""`edgelora eval` on a pico base: its numbers by another way, its JSON, what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pico
import pytest
from cli_runner import run
from llama_logits import logits

from edgelora import memory
from edgelora.datasets.template import Segment
from edgelora.engine.model import open_model

LINES = [
    ("is it you", "yes"),
    ("was he there", "no"),
    ("are they at the house", "they are"),
    ("have you that", "no"),
    ("is this from her", "it is"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.gguf, a.gguf, b.gguf and five lines of data.jsonl."""
    folder = tmp_path_factory.mktemp("eval")
    base = pico.write_base(folder / "base.gguf")
    for seed, name in enumerate("ab"):
        pico.write_random_lora(folder / f"{name}.gguf", base, seed=seed,
                               metadata={"edgelora.template": "chat"})  # fmt: skip
    write_lines(folder / "data.jsonl", LINES)
    return folder


def write_lines(path: Path, lines: list[tuple[str, str]]) -> Path:
    text = "\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in lines)
    path.write_text(text, encoding="utf-8")
    return path


def by_hand(base: Path, adapter: Path | None, lines: list[tuple[str, str]]) -> tuple[float, int]:
    """Loss and token count from full logits and a prompt written out by hand."""
    total, n_tokens = 0.0, 0
    with open_model(base) as model:
        ids = [
            (
                model.vocabulary.tokenize_segments(
                    [Segment("<|im_start|>", True), Segment(f"user\n{prompt}", False),
                     Segment("<|im_end|>", True), Segment("\n", False),
                     Segment("<|im_start|>", True), Segment("assistant\n", False)]
                ),
                answer,
            )
            for prompt, answer in lines
        ]  # fmt: skip
        whole = []
        for prompt_ids, answer in ids:
            joined = model.vocabulary.tokenize(f"assistant\n{answer}")
            opening = model.vocabulary.tokenize("assistant\n")
            assert joined[: len(opening)] == opening
            end = model.vocabulary.control_ids["<|im_end|>"]
            whole.append((prompt_ids, [*joined[len(opening) :], end]))
    for prompt_ids, answer_ids in whole:
        rows = logits(base, [*prompt_ids, *answer_ids], adapter).astype(np.float64)
        for position, token in enumerate(answer_ids, len(prompt_ids) - 1):
            total += np.log(np.exp(rows[position]).sum()) - rows[position][token]
            n_tokens += 1
    return total / n_tokens, n_tokens


def test_the_losses_are_those_of_full_logits(folder: Path) -> None:
    a, b = folder / "a.gguf", folder / "b.gguf"
    result = run("eval", "--base", folder / "base.gguf", "--adapter", a, "--adapter", b,
                 "--data", folder / "data.jsonl", "--no-generate", "--json", "-q")  # fmt: skip
    assert result.exit_code == 0 and result.stderr == "", result.output
    found = json.loads(result.stdout)
    assert list(found) == ["data", "examples", "arms"]
    assert found["data"] == str(folder / "data.jsonl") and found["examples"] == 5
    assert [arm["name"] for arm in found["arms"]] == ["base", str(a), str(b)]
    for arm, adapter in zip(found["arms"], (None, a, b), strict=True):
        assert list(arm) == ["name", "loss", "n_tokens", "rouge_l", "exact_match", "loss_vs_base"]
        loss, n_tokens = by_hand(folder / "base.gguf", adapter, LINES)
        assert arm["n_tokens"] == n_tokens
        # F16 KV and several threads against F32 KV and one.
        assert arm["loss"] == pytest.approx(loss, abs=0.01)
        assert arm["rouge_l"] is None and arm["exact_match"] is None
    base, first, _ = found["arms"]
    assert base["loss_vs_base"] is None
    low, mid, high = first["loss_vs_base"]
    assert low <= mid <= high and mid == pytest.approx(first["loss"] - base["loss"], abs=1e-6)


def test_answers_are_compared_and_the_table_is_printed(folder: Path) -> None:
    line = ("eval", "--base", folder / "base.gguf", "--adapter", folder / "a.gguf",
            "--data", folder / "data.jsonl", "--limit", 2, "--max-tokens", 4)  # fmt: skip
    arms = json.loads(run(*line, "--json").stdout)["arms"]
    assert all(0 <= arm["rouge_l"] <= 1 and 0 <= arm["exact_match"] <= 1 for arm in arms)
    shown = run(*line)
    rows = shown.stdout.splitlines()
    assert rows[0].split()[:5] == ["arm", "loss", "tokens", "ROUGE-L", "exact"]
    assert rows[1].split()[:2] == ["base", f"{arms[0]['loss']:.4f}"]
    assert str(folder / "a.gguf") in rows[2] and "[" in rows[2] and len(rows) == 3
    assert "2 examples (jsonl prompt/completion" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("peak memory: ")


def test_the_same_line_gives_the_same_numbers(folder: Path) -> None:
    line = ("eval", "--base", folder / "base.gguf", "--adapter", folder / "a.gguf", "--threads", 1,
            "--data", folder / "data.jsonl", "--no-generate", "--json", "--seed", 3)  # fmt: skip
    assert run(*line).stdout == run(*line).stdout
    kept = json.loads(run(*line, "--low-ram").stdout)
    assert kept["arms"][0]["loss"] == pytest.approx(
        json.loads(run(*line).stdout)["arms"][0]["loss"], abs=0.01
    )


def test_little_free_memory_chooses_low_ram_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "base.gguf").stat().st_size
    line = ("eval", "--base", folder / "base.gguf", "--adapter", folder / "a.gguf", "--threads", 1,
            "--data", folder / "data.jsonl", "--no-generate", "--limit", 1, "-q")  # fmt: skip
    for free, is_chosen in ((size, True), (3 * size // 2 + 1, False)):
        for name, text in {"max": f"{free}", "current": "0", "stat": "inactive_file 0"}.items():
            (tmp_path / f"memory.{name}").write_text(text)
        monkeypatch.setattr(memory, "_CGROUP", tmp_path)
        said = run(*line).stderr
        assert said.startswith("warning:") == is_chosen, said
        if is_chosen:
            assert "--low-ram was chosen" in said and "--no-low-ram chooses otherwise" in said
        assert run(*line, "--no-low-ram").stderr == run(*line, "--low-ram").stderr == ""


def test_the_interval_of_a_single_example_is_null_in_json(folder: Path) -> None:
    result = run("eval", "--base", folder / "base.gguf", "--adapter", folder / "a.gguf", "--json",
                 "--data", folder / "data.jsonl", "--no-generate", "--limit", 1)  # fmt: skip
    assert "Infinity" not in result.stdout
    low, mid, high = json.loads(result.stdout)["arms"][1]["loss_vs_base"]
    assert low is None and high is None and isinstance(mid, float)


def test_another_template_is_a_warning_with_q_too(folder: Path) -> None:
    line = ("eval", "--base", folder / "base.gguf", "--adapter", folder / "a.gguf",
            "--data", folder / "data.jsonl", "--no-generate", "-q")  # fmt: skip
    assert run(*line).stderr == ""
    raw = run(*line, "--template", "Q: {prompt}\\nA:")
    assert raw.exit_code == 0
    assert "trained with another prompt template (the base's chat template)" in raw.stderr


def test_an_adapter_that_does_not_fit_is_refused_before_any_work(
    folder: Path, tmp_path: Path
) -> None:
    other = pico.write_base(tmp_path / "other.gguf", "qwen2")
    wrong = pico.write_random_lora(tmp_path / "wrong.gguf", other)
    result = run("eval", "--base", folder / "base.gguf", "--adapter", folder / "a.gguf",
                 "--adapter", wrong, "--data", folder / "data.jsonl", "--no-generate")  # fmt: skip
    assert result.exit_code == 1 and result.stdout == ""
    assert "wrong.gguf" in result.stderr and "made for qwen2" in result.stderr


def test_what_eval_refuses(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "is it"}\n{"prompt": "was it"}\n', encoding="utf-8")
    long = write_lines(tmp_path / "long.jsonl", [("is it you", "yes"), ("you " * 600, "no")])
    plain = pico.write_base(tmp_path / "plain.gguf", chat_template=None)
    for base, data, message in (
        (folder / "base.gguf", prompts, "no line has a completion"),
        (folder / "base.gguf", long, "line 2"),
        (folder / "base.gguf", tmp_path / "none.jsonl", "none.jsonl"),
        (plain, folder / "data.jsonl", "--template"),
        ("smollm3", folder / "data.jsonl", "neither a file nor a base"),
    ):
        result = run("eval", "--base", base, "--adapter", folder / "a.gguf", "--data", data,
                     "--no-generate")  # fmt: skip
        assert result.exit_code == 1 and message in result.stderr, result.output


def test_a_bad_line_is_reported_by_its_number(folder: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", LINES)
    data.write_text(data.read_text("utf-8") + "\n{broken", encoding="utf-8")
    result = run("eval", "--base", folder / "base.gguf", "--adapter", folder / "a.gguf",
                 "--data", data, "--no-generate", "--json")  # fmt: skip
    assert result.exit_code == 0 and "line 6" in result.stderr
    assert json.loads(result.stdout)["examples"] == 5


def test_without_rouge_score_the_extra_is_named_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelora import metrics

    if importlib.util.find_spec("rouge_score"):
        monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    metrics._rouge_scorer.cache_clear()
    line = ("eval", "--base", folder / "none.gguf", "--adapter", folder / "a.gguf",
            "--data", folder / "data.jsonl")  # fmt: skip
    result = run(*line)
    metrics._rouge_scorer.cache_clear()
    assert result.exit_code == 1 and "edgelora[eval]" in result.stderr
    assert "edgelora[eval]" not in run(*line, "--no-generate").stderr
