"""`edgelora cache` and `edgelora doctor`, the chart, and messages of errors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pico
import pytest
from cli_runner import run
from rich.console import Console

from edgelora.cli.charts import coefficients_chart
from edgelora.cli.console import clean
from edgelora.cli.doctor import parse_flags
from edgelora.embedding_cache import open_cache
from edgelora.engine import machine
from edgelora.engine.machine import cpu_model
from edgelora.engine.needs import needs_of, shortage
from edgelora.engine.threads import Threads, store_threads, stored_threads
from edgelora.gradient.kernels import FINDINGS as PRODUCTS

pytestmark = pytest.mark.usefixtures("own_cache")


def test_cache_ls_and_clear(tmp_path: Path) -> None:
    with open_cache() as cache:
        cache.put("base-1", [[1], [2]], np.ones((2, 8), np.float32))
    listed = run("cache", "ls")
    assert listed.stdout.splitlines()[1].split() == ["base-1", "2", "0.0"]
    assert str(tmp_path / "cache") in listed.stderr and "at most 268 MB" in listed.stderr
    found = json.loads(run("cache", "ls", "--json").stdout)
    assert found["folder"] == str(tmp_path / "cache")
    assert found["entries"] == [{"model": "base-1", "n_embeddings": 2, "size_bytes": 64}]
    assert run("cache", "clear").stdout == (
        "cleared: 2 embeddings, 0 means, 0 kernels of banks, 0 ends of builds, "
        "0 choices of products\n"
    )
    assert json.loads(run("cache", "clear", "--json").stdout)["n_cleared"] == 0
    assert run("cache", "ls", "-q").stderr == ""


def test_a_cache_that_cannot_be_made_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    result = run("cache", "ls")
    assert result.exit_code == 1 and result.stderr.startswith("error:")
    assert str(tmp_path / "cache") in result.stderr.replace("\n", "")


def test_doctor_prints_the_machine() -> None:
    shown = run("doctor")
    assert shown.exit_code == 0, shown.output
    for title in ("edgelora", "CPU", "RAM", "llama.cpp", "packages", "cache", "base"):
        assert any(line.startswith(title) for line in shown.stdout.splitlines()), title
    report = json.loads(run("doctor", "--json").stdout)
    assert report["ram"]["total_bytes"] > report["ram"]["available_bytes"] > 0
    assert report["cpu"]["model"] == cpu_model() != ""
    assert report["llama_cpp"]["CPU"] and report["packages"]["numpy"] == np.__version__
    assert "smollm2-135m-instruct" in report["bases"] and "base" not in report


def test_what_was_tried_out_is_shown_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    store_threads("llama", Threads(prompt=2, decode=1))
    with monkeypatch.context() as patch:
        patch.setattr(machine, "cpu_model", lambda: "another CPU")
        PRODUCTS.store("Q8_0, 2 threads", "mapped")
    PRODUCTS.store("Q4_0, 2 threads", "float32")
    shown = [" ".join(line.split()) for line in run("doctor").stdout.splitlines()]
    assert "threads llama: 1 decode, 2 prompt" in shown
    assert [line for line in shown if line.startswith("products")] == [
        "products Q4_0, 2 threads: float32"
    ]
    report = json.loads(run("doctor", "--json").stdout)["tried_out"]
    assert report["products"] == {"Q4_0, 2 threads": "float32"}
    assert json.loads(run("cache", "clear", "--json").stdout)["n_products_cleared"] == 2
    assert PRODUCTS.found() == {} and stored_threads("llama") == Threads(prompt=2, decode=1)


def test_doctor_says_what_a_base_needs(tmp_path: Path) -> None:
    path = pico.write_base(tmp_path / "base.gguf", dtype="Q8_0")
    report = json.loads(run("doctor", "--base", path, "--json").stdout)["base"]
    # 2 layers of K and V: 2 heads of 8 values of 2 bytes, at 4096 tokens.
    assert report["kv_bytes"] == 2 * 2 * 2 * 8 * 2 * 4096
    assert 0 < report["repacked_bytes"] < report["weights_bytes"] < path.stat().st_size
    assert report["verdict"] == "fits" and not report["low_ram"]
    shown = run("doctor", "--base", path)
    assert "KV cache" in shown.stdout and "0.5 MB at 4096 tokens" in shown.stdout
    assert needs_of(pico.write_base(tmp_path / "f.gguf")).repacked_bytes == 0
    assert run("doctor", "--base", tmp_path / "none.gguf").exit_code == 1


def test_the_verdict_at_its_borders(tmp_path: Path) -> None:
    needs = needs_of(pico.write_base(tmp_path / "base.gguf"))
    whole = needs.private_bytes + needs.weights_bytes
    assert needs.verdict(whole) == "fits"
    assert needs.verdict(whole - 1).startswith("fits only with --low-ram")
    assert needs.verdict(needs.private_bytes - 1).startswith("does not fit")


def test_low_ram_is_chosen_under_one_and_a_half_times_the_file(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(bytes(1000))
    assert shortage(path, 1500) == ""
    assert "free, less than 1.5 times" in shortage(path, 1499)


def test_flags_of_llama_cpp_are_read() -> None:
    line = "Metal : EMBED_LIBRARY = 1 | CPU : NEON = 1 | AVX2 = 0 | SVE_CNT = 32 | REPACK = 1 | "
    assert parse_flags(line) == {
        "Metal": ["EMBED_LIBRARY"],
        "CPU": ["NEON", "SVE_CNT=32", "REPACK"],
    }
    assert parse_flags("") == {}


def drawn(names: list[str], coefficients: list[float], width: int = 60) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(coefficients_chart(names, coefficients))
    file = console.file
    assert isinstance(file, io.StringIO)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_bars_are_as_long_as_their_coefficients() -> None:
    lines = drawn(["a", "b", "c"], [1.0, 0.5, 0.0])
    assert [line.count("█") for line in lines] == [40, 20, 0]
    assert lines[1].startswith("b  +0.500  █")


def test_negative_bars_end_at_zero_where_positive_ones_begin() -> None:
    more, less, least = drawn(["a", "b", "c"], [0.5, -0.5, -0.25])
    assert (more.count("█"), less.count("█"), least.count("█")) == (20, 20, 10)
    zero = more.index("█")
    assert less.rindex("█") == zero - 1 == least.rindex("█")


def test_a_chart_copes_with_what_it_is_given() -> None:
    assert drawn([], []) == []
    assert drawn(["x"], [0.0])[0].startswith("x  +0.000")
    assert "nan" in drawn(["x"], [float("nan")])[0]
    (hostile,) = drawn(["[red]\x1b[2J"], [1.0])
    assert "[red]" in hostile and "\x1b" not in hostile
    assert all(len(line) <= 30 for line in drawn(["name " * 8, "b"], [1.0, -2.0], width=30))


def test_control_characters_are_replaced() -> None:
    assert clean("a\x1b[31mb\x07\u202e\r\n\tä🙂") == "a\ufffd[31mb\ufffd\ufffd\ufffd\n\tä🙂"
