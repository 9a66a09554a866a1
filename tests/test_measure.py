"""`edgelora doctor --measure`: types of weights timed on a pico base, and the threads it keeps."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pico
import pytest
from cli_runner import run

from edgelora.adapters.base import read_base
from edgelora.engine import measure, threads
from edgelora.engine.context import Row, open_context
from edgelora.engine.measure import Measured, TypeSpeed, measure_types
from edgelora.engine.model import ModelOptions, open_model
from edgelora.engine.quantize import quantize
from edgelora.engine.threads import Threads, store_threads, stored_threads
from edgelora.errors import EdgeLoRAError, EngineError
from edgelora.gguf_file import open_gguf

DIMS = replace(pico.Dims(), n_layer=4)


@pytest.fixture
def base_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return pico.write_base(tmp_path / "base.gguf", dims=DIMS)


def test_a_copy_of_the_first_layers_computes_what_they_compute(
    base_path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.gguf"
    quantize(base_path, copy, "f32", n_layers=2, n_threads=1)
    assert read_base(copy).n_layer == 2
    rows = [Row(token, i, 0, True) for i, token in enumerate(range(5, 25))]
    found = []
    for path, n_layers in ((base_path, 2), (copy, 0)):
        with (
            open_model(path, ModelOptions(n_threads=1)) as model,
            open_context(model, hidden=True, exact=True) as context,
        ):
            x = context.hidden(rows, n_layers)
            found.append(x / np.sqrt((x**2).mean(axis=1, keepdims=True)))
    # The copy's states passed the last norm: its weights are undone up to a factor of each row.
    plain = found[1] / open_gguf(copy).array("output_norm.weight")
    plain /= np.sqrt((plain**2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(plain, found[0], atol=1e-3)
    with pytest.raises(EngineError, match="first 5 of 4 layers"):
        quantize(base_path, tmp_path / "no.gguf", "f32", n_layers=5)


def test_types_are_measured_and_their_files_removed(base_path: Path, tmp_path: Path) -> None:
    told = []
    measured = measure_types(
        base_path, types=("q8_0", "q4_k_m", "x", "bf16"), n_threads=1, rounds=1,
        progress=lambda file_type, done: told.append((file_type, done)),
    )  # fmt: skip
    assert [t.file_type for t in measured.types] == ["q8_0", "bf16"]
    assert all(t.prompt > 0 and t.decode > 0 for t in measured.types)
    assert measured.left_out == {
        "q4_k_m": "q4_k_m: rows of 32 are not whole blocks of 256",
        "x": "x: not a type that is written here",
    }
    assert (measured.n_measured, measured.n_layer) == (4, 4)
    assert measured.threads == Threads(1, 1)
    assert told == [("q8_0", 0), ("q4_k_m", 1), ("x", 2), ("bf16", 3), ("", 4)]
    assert not list(tmp_path.glob("edgelora-measure-*"))
    with pytest.raises(EdgeLoRAError, match="nothing could be measured"):
        measure_types(base_path, types=("x",))


def test_a_layer_counts_for_the_others(base_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 2 of 4 layers take 10 s for a prompt and 3 s for a token, the head 1 s of each."""
    monkeypatch.setattr(measure, "MAX_COPY_BYTES", 1)
    assert measure._layers_that_fit(read_base(base_path)) == 2
    monkeypatch.setattr(measure, "_time_prompt", lambda context, rounds: 10.0)
    monkeypatch.setattr(
        measure, "_time_answer", lambda context, rounds: 2.0 if context.n_outputs == 7 else 3.0
    )

    class Ready:
        def __init__(self, hidden: bool) -> None:
            self.n_outputs = 7 if hidden else 0

        def set_threads(self, threads: Threads) -> None:
            pass

        def __enter__(self) -> Ready:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(measure, "_ready", lambda model, hidden=False: Ready(hidden))
    prompt, decode = measure._speed(None, Threads(1, 1), 2.0, 1)
    assert (prompt, decode) == (pytest.approx(512 / 19), pytest.approx(1 / 5))


def test_what_does_not_fit_the_ram_is_not_recommended() -> None:
    types = (TypeSpeed("bf16", 14_000, 99, 99), TypeSpeed("q8_0", 7_000, 50, 9),
             TypeSpeed("q4_0", 4_000, 40, 20))  # fmt: skip
    measured = Measured("llama", 32, 2, Threads(1, 1), types, {})
    chosen = [measured.fastest(ram).file_type for ram in (20_000, 10_000, 6_000, 1_000)]
    assert chosen == ["bf16", "q4_0", "q4_0", "q4_0"]
    assert types[2].seconds() == pytest.approx(512 / 40 + 128 / 20)


def test_no_room_for_the_copies_is_told_first(
    base_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_MARGIN_BYTES", 1 << 60)
    with pytest.raises(EdgeLoRAError, match="temporary files take"):
        measure_types(base_path)


def threads_of(path: Path, n_threads: int = 0) -> tuple[int, int]:
    """What llama.cpp itself says that a context uses, for answers and for prompts."""
    with (
        open_model(path, ModelOptions(n_threads=n_threads)) as model,
        open_context(model) as context,
    ):
        return (
            llama_cpp.llama_n_threads(context.handle),
            llama_cpp.llama_n_threads_batch(context.handle),
        )


def test_kept_threads_are_used_unless_others_are_asked_for(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    assert stored_threads("llama") is None
    assert threads_of(base_path) == (4, 4)
    kept = store_threads("llama", Threads(prompt=3, decode=2))
    assert stored_threads("llama") == Threads(3, 2) and stored_threads("qwen2") is None
    assert threads_of(base_path) == (2, 3)
    assert threads_of(base_path, n_threads=1) == (1, 1)
    store_threads("qwen2", Threads(1, 1))
    assert stored_threads("llama") == Threads(3, 2)
    (key,) = [key for key in json.loads(kept.read_text()) if key.endswith(", llama")]
    wrong = [3, *({"prompt": n, "decode": 1} for n in (True, 9, 0, 2.0))]
    for damaged in ("{", "[]", *(json.dumps({key: value}) for value in wrong)):
        kept.write_text(damaged)
        assert stored_threads("llama") is None
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical=True: 2)
    assert stored_threads("llama") is None, "another machine"


def test_the_command_prints_a_table_and_keeps_the_threads(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TYPES", ("q8_0", "q4_k_m", "q4_0"))
    shown = run("doctor", "--measure", base_path)
    assert shown.exit_code == 0, shown.output
    assert "type" in shown.stdout and "q8_0" in shown.stdout and "fetch Q" in shown.stdout
    assert "q4_k_m is left out" in shown.stderr and "threads.json" in shown.stderr
    assert stored_threads("llama") is not None
    as_json = json.loads(run("doctor", "--measure", base_path, "--threads", 1, "--json").stdout)
    assert as_json["kept"] is None and as_json["fastest"] in ("q8_0", "q4_0")
    assert [t["file_type"] for t in as_json["types"]] == ["q8_0", "q4_0"]
    assert run("doctor", "--measure", tmp_path / "none.gguf").exit_code == 1
