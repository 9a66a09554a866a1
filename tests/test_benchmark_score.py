"""The benchmark of scoring: both sides agree on a pico base, and a difference is refused."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
from adapter_benchmark import scoring
from adapter_benchmark.scoring_report import score_table

from edgelora.datasets.records import Example, Message

ABOUT = {"when": "2026-01-01 00:00 UTC", "commit": "abc", "cpu": "a CPU", "n_threads": 1,
         "llama_cpp_python": "0.3.36", "model": "m", "dataset": "d.jsonl"}  # fmt: skip
OPTIONS = scoring.Options(n_ctx=256, rounds=2)


def examples() -> list[Example]:
    pairs = [("the cat and the hat", "is it"), ("is it you?", "yes"), ("the cat is on", "a b c")]
    return [
        Example((Message("user", prompt),), completion, (completion,), i + 1)
        for i, (prompt, completion) in enumerate(pairs)
    ]


def adapters(folder: Path, base: Path) -> list[Path]:
    return [pico.write_random_lora(folder / f"{i}.gguf", base, seed=i) for i in range(2)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_both_sides_agree(architecture: str, tmp_path: Path) -> None:
    """With a SentencePiece vocabulary that adds BOS, and a BPE one whose BOS begins a message."""
    base = pico.write_base(tmp_path / "base.gguf", architecture)
    texts = scoring.read_texts(base, examples())
    row = scoring.measure_scoring(base, adapters(tmp_path, base), texts, OPTIONS)
    assert (row["n_adapters"], row["n_texts"], row["rounds"]) == (2, 3, 2)
    assert row["largest_difference"] < 0.02 < row["adapters_apart"]
    assert row["exact_difference"] < 1e-4
    assert 0 < row["theirs_load_s"] < row["theirs_s"] and row["ours_open_s"] < row["ours_s"]
    table = score_table({**ABOUT, **row, "ratio": 4.94})
    assert "| all | 4.9 (" in table and "at least 5: **missed**" in table


def test_other_log_likelihoods_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    texts = scoring.read_texts(base, examples())
    monkeypatch.setattr(scoring, "_echoed", lambda llama, text: -1.0)
    with pytest.raises(SystemExit, match="with F32 weights they differ by"):
        scoring.measure_scoring(base, adapters(tmp_path, base), texts, OPTIONS)


def test_a_text_without_bos_is_refused(tmp_path: Path) -> None:
    """llama-cpp-python would give each echoed token the log-probability of another position."""
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    base = pico.write_base(tmp_path / "base.gguf", "qwen2", chat_template=template)
    with pytest.raises(SystemExit, match="line 1: does not begin with BOS"):
        scoring.read_texts(base, examples())
