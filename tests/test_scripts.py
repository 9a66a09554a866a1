"""Scripts: each says how it is used; the model card and the terminal picture on small input."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_what_it_does(script: Path) -> None:
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    assert docstring.partition("\n")[0].endswith(".")
    assert f"python scripts/{script.name}" in docstring


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    for name, source in (("task1", "a"), ("task2", "b")):
        (tmp_path / "bank").mkdir(exist_ok=True)
        (tmp_path / "bank" / f"{name}.gguf").write_bytes(b"x" * 1_500_000)
        facts = {"source": [source], "category": ["Sums", "Words"], "licence": ["MIT"]}
        (tmp_path / "tasks" / name).mkdir(parents=True)
        (tmp_path / "tasks" / name / "task.json").write_text(json.dumps(facts))
    (tmp_path / "bank.log").write_text(
        "task1 loss 3.001 -> 0.500  9s  80 tok/s\ntask2 skipped: 0\ntask2 loss 2.000 -> 1.000  9s\n"
    )
    recipe = {"base": "Pico", "steps": 4, "batch": 2, "lr": 0.1, "rank": 8, "alpha": 16}
    recipe |= {"modules": ["q_proj"], "max_tokens": 9, "n_test": 32, "bf16": False}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    return tmp_path


def run_card(folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [str(folder / name) for name in ("bank", "tasks", "bank.log")]
    command = [sys.executable, str(ROOT / "scripts" / "make_model_card.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_model_card_lists_every_adapter(bank: Path) -> None:
    assert run_card(bank).returncode == 0
    text = (bank / "bank" / "README.md").read_text()
    assert "| task1 | a | Sums, Words | MIT | 1.50 | 3.00 | 0.50 |" in text
    assert "# A bank of 2 LoRA adapters for Pico" in text
    assert "3.0 MB" in text and "MIT (2)" in text and "float32" in text


def test_no_card_for_an_adapter_of_unknown_origin(bank: Path) -> None:
    (bank / "bank" / "task3.gguf").write_bytes(b"x")
    done = run_card(bank)
    assert done.returncode == 1
    assert "task3: no line in" in done.stderr and "task3: no " in done.stderr
    assert not (bank / "bank" / "README.md").exists()


def test_progress_bars_leave_what_a_terminal_shows() -> None:
    settled = load("terminal_picture").settled
    assert settled("one\r\n\x1b[32mtwo\x1b[0m\n") == "one\n\x1b[32mtwo\x1b[0m\n"
    drawn = "a\n\x1b[?25l\r\x1b[2K 0%\r\x1b[2K 99%\n\x1b[?25h\r\x1b[1A\x1b[2Kdone\n"
    assert settled(drawn).rstrip("\n") == "a\ndone"


def test_the_picture_holds_the_text(tmp_path: Path) -> None:
    load("terminal_picture").save("$ edgelora build\n\x1b[32mok\x1b[0m", tmp_path / "x.svg", 60)
    svg = (tmp_path / "x.svg").read_text()
    assert svg.startswith("<svg") and "edgelora&#160;build" in svg and ">ok<" in svg


def test_set_up_is_done_again_when_the_project_changes(tmp_path: Path) -> None:
    setup = load("setup")
    assert setup._requirement().startswith("llama-cpp-python>=")
    plain, amx = (setup.build_environment({}, flags) for flags in ("", "avx2 amx_tile"))
    made = {
        setup._fingerprint(*arguments)
        for arguments in (
            ("demo,dev", "", plain),
            ("demo,dev", "", dict(plain)),
            ("demo,dev", "torch", plain),
            ("demo,dev", "", amx),
        )
    }
    assert len(made) == 3


def test_what_amx_needs_is_added_to_the_users_flags() -> None:
    setup = load("setup")
    stock = {"CMAKE_ARGS": setup.CMAKE_ARGS, "CXXFLAGS": ""}
    assert setup.build_environment({}, "flags: sse avx512f") == stock
    own = {"CMAKE_ARGS": "-DGGML_BLAS=ON", "CXXFLAGS": "-g"}
    assert setup.build_environment(own, "flags: amx_int8 amx_tile") == {
        "CMAKE_ARGS": "-DGGML_BLAS=ON", "CXXFLAGS": "-g -fno-dse",
    }  # fmt: skip
