"""Broken AMX kernels are found in a process of their own, once, and never used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import posix_only

from edgelora.engine import amx, native


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libggml-cpu.so"
    path.write_bytes(b"kernels")
    return path


def test_the_installed_llama_cpp_passes_or_says_why() -> None:
    done = subprocess.run(amx.SELF_TEST, capture_output=True, text=True)
    assert amx.warning() == "" or "without -fno-dse" in amx.warning()
    assert (done.returncode == 0) == (amx.warning() == ""), done.stderr


def test_a_pass_is_remembered_until_the_library_changes(library: Path, tmp_path: Path) -> None:
    cache, runs = tmp_path / "amx.json", tmp_path / "runs"
    command = python(f"open({str(runs)!r}, 'a').write('x')")
    for _ in range(2):
        assert amx.decide(command, [library], cache) == ""
    assert runs.read_text() == "x"
    library.write_bytes(b"other kernels")
    amx.decide(command, [library], cache)
    assert runs.read_text() == "xx"


@posix_only
def test_a_crash_is_a_warning_that_says_how_to_rebuild(library: Path, tmp_path: Path) -> None:
    cache = tmp_path / "amx.json"
    dies = python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    warning = amx.decide(dies, [library], cache)
    assert "died of SIGSEGV" in warning
    assert "CXXFLAGS=-fno-dse pip install --force-reinstall --no-cache-dir --no-deps " in warning
    assert f"llama-cpp-python=={native.version()}" in warning
    assert amx.decide(python("pass"), [library], cache) == warning, "not run again"


@posix_only
@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), "SIGKILL"),
        (python("raise ImportError('no gguf')"), "ImportError: no gguf"),
        (["/no/such/program"], "FileNotFoundError"),
    ],
)
def test_what_may_pass_is_not_remembered(
    command: list[str], reason: str, library: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "amx.json"
    assert reason in amx.decide(command, [library], cache)
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage", ["", "[]", "{", "[" * 100_000, '{"libraries": 3}', '{"reason": null}']
)
def test_a_damaged_cache_is_made_anew(damage: str, library: Path, tmp_path: Path) -> None:
    cache = tmp_path / "amx.json"
    cache.write_text(damage)
    assert amx.decide(python("pass"), [library], cache) == ""
    assert json.loads(cache.read_text())["reason"] == ""


def test_a_cache_that_cannot_be_written_is_no_error(library: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert amx.decide(python("pass"), [library], tmp_path / "file" / "amx.json") == ""


def test_warnings_for_each_tensor_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="edgelora.llama_cpp"):
        for name in "abc":
            native.keep_line(3, f"load: lora for '{name}' cannot use buft 'AMX', fallback to CPU")
        native.keep_line(3, "load: something else")
        native.keep_line(1, "create_tensor: loading tensor a")
        native.keep_line(5, "....")
    told = [record.getMessage() for record in caplog.records]
    assert sum("cannot use buft" in line for line in told) <= 1
    assert "load: something else" in told and "...." not in told
    assert "load: something else" in native.recent_log()
    assert not any("create_tensor" in line for line in (*told, *native.recent_log()))
