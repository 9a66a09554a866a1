"""`edgelora serve` as a process: its messages, its signals, its exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pico
import pytest
from cli_runner import posix_only, run

from edgelora.bases import catalogue
from edgelora.serve.settings import Settings

COMMAND = [sys.executable, "-m", "edgelora", "serve", "--threads", "1", "--port", "0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose answers take long enough to be interrupted: it has many positions."""
    folder = tmp_path_factory.mktemp("cli-serve")
    path = pico.write_base(folder / "base.gguf", dims=pico.Dims(n_ctx=32768, n_embd=64, n_head=8))
    pico.write_random_lora(folder / "a.gguf", path)
    return path


class Process:
    """A running `edgelora serve`."""

    def __init__(self, *words: object, **environment: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(line for line in self.process.stderr)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line on stderr."""
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match
            assert self.process.poll() is None, self.stderr
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {self.stderr!r}")

    @property
    def stderr(self) -> str:
        """All that was said."""
        if self.process.poll() is not None:
            self._reader.join()
        return "".join(self.lines)

    def url(self) -> str:
        """Where it answers, once it is ready."""
        found = self.wait_for(r"(http://\S+) has the page")[1]
        self.wait_for("ready after")
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextlib.contextmanager
def started(*words: object, **environment: str) -> Iterator[Process]:
    process = Process(*words, **environment)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()
        process._reader.join()
        assert process.process.stderr is not None
        process.process.stderr.close()


@posix_only
def test_it_says_where_it_is_and_ends_in_order(base: Path) -> None:
    with started("--base", base, "--adapter", base.parent / "a.gguf", "--slots", 2) as server:
        url = server.url()
        assert server.wait_for(r"2 slots of 4,096 tokens; KV cache .* prefixes \d+ MB")
        assert server.wait_for("models: base, a")
        assert httpx.get(f"{url}/ready").status_code == 200
        assert server.end(signal.SIGINT) == 0
        assert "ending" in server.stderr and "Traceback" not in server.stderr
        assert server.lines[-1].startswith("peak memory: ")


@pytest.mark.slow
@posix_only
def test_running_requests_finish_and_new_ones_are_refused(base: Path) -> None:
    with started("--base", base, "--slots", 1, "--context", 20000) as server:
        url = server.url()
        body = {"prompt": "the", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("ending")
            refused = httpx.get(f"{url}/v1/models")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(30) == 0


@pytest.mark.slow
@posix_only
def test_a_drain_is_bounded(base: Path) -> None:
    words = ("--base", base, "--slots", 1, "--context", 32768, "--drain-timeout", 0.2)
    with started(*words) as server:
        body = {"prompt": "the", "max_tokens": 32000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url()}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert '"error"' in last
        assert server.process.wait(30) == 0
        assert "were cut off" in server.stderr


@pytest.mark.slow
@posix_only
def test_a_second_signal_ends_at_once(base: Path) -> None:
    with started("--base", base, "--slots", 1, "--context", 32768) as server:
        body = {"prompt": "the", "max_tokens": 32000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url()}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("ending")
            assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.slow
@posix_only
def test_it_can_be_ended_while_it_loads(base: Path, tmp_path: Path) -> None:
    slow = tmp_path / "sitecustomize.py"
    slow.write_text(
        "import time\nfrom edgelora.serve.server import Server\n"
        "Server._open = lambda self: time.sleep(60)\n"
    )
    with started("--base", base, PYTHONPATH=str(tmp_path)) as server:
        url = server.wait_for(r"(http://\S+) has the page")[1]
        assert httpx.get(f"{url}/health").json() == {"status": "loading"}
        assert server.end() == 0


@pytest.mark.slow
def test_a_crash_of_the_engine_turns_health_red_and_exits_with_1(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from edgelora.engine.context import Context\n"
        "def broken(self, *_a, **_k): raise RuntimeError('the engine broke')\n"
        "Context.compute = broken\n"
    )
    with started("--base", base, PYTHONPATH=str(tmp_path)) as server:
        url = server.url()
        reply = httpx.post(f"{url}/v1/completions", json={"prompt": "the", "max_tokens": 4})
        assert reply.status_code in (500, 503)
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_failed")
        assert server.process.wait(30) == 1
        assert "the engine broke" in server.stderr


@pytest.mark.slow
def test_a_bank_is_known_and_loaded_on_demand(base: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    for seed, name in enumerate(("one", "two")):
        dims = pico.Dims(n_embd=64, n_head=8)
        folder = pico.write_peft(tmp_path / name, seed=seed, dims=dims)
        added = run("bank", "add", folder, "--bank", bank, "--base", base, "--name", name)
        assert added.exit_code == 0, added.stderr
    with started("--base", base, "--bank", bank, "--adapter", "two") as server:
        url = server.url()

        def loaded() -> dict[str, bool]:
            found = httpx.get(f"{url}/v1/adapters").json()["data"]
            return {adapter["id"]: adapter["loaded"] for adapter in found}

        assert loaded() == {"one": False, "two": True}
        body = {"model": "one", "prompt": "the", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        assert loaded() == {"one": True, "two": True}
        assert httpx.delete(f"{url}/v1/adapters/one").json()["in_memory"] is False
        assert loaded() == {"one": False, "two": True}


# --- what is wrong before anything is served


def test_a_busy_port_is_said_before_a_model_is_loaded(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--base", base, "--port", port)
    assert result.exit_code == 1
    assert f"cannot listen at 127.0.0.1 port {port}" in result.stderr
    assert "KV cache" not in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "none.gguf"], "none.gguf"),
        (["--host", "no.such.host.invalid"], "cannot listen at"),
        (["--api-key-file", "none"], "no such file of API keys"),
        (["--kv-type", "q8_0"], "error:"),  # heads of 8 values do not fit blocks of 32
    ],
)
def test_what_cannot_be_served_ends_with_a_message(
    base: Path, words: list[Any], message: str
) -> None:
    result = run("serve", "--base", base, "--port", 0, *words)
    assert result.exit_code == 1 and message in result.stderr, result.stderr


def test_an_open_door_is_a_warning(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("edgelora.serve.lifecycle.run", lambda *_args, **_more: None)
    result = run("serve", "--base", base, "--port", 0, "--host", "0.0.0.0")
    assert "no API key is asked for" in result.stderr
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    closed = run("serve", "--base", base, "--port", 0, "--host", "0.0.0.0", "--api-key-file", keys)
    local = run("serve", "--base", base, "--port", 0, "--seed", 3)
    assert "API key" not in closed.stderr + local.stderr
    assert "--seed has no effect" in local.stderr


def test_a_named_base_keeps_its_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = catalogue()["tinyllama-1.1b-chat-v1.0"]
    (tmp_path / entry.file).symlink_to(base)
    monkeypatch.setenv("EDGELORA_MODELS", str(tmp_path))
    given: list[Settings] = []
    monkeypatch.setattr(
        "edgelora.serve.lifecycle.run", lambda s, *_, **__: given.append(s.settings)
    )
    for name in (entry.name, base):
        assert run("serve", "--base", name, "--port", 0).exit_code == 0
    assert [settings.base_id for settings in given] == [entry.name, "base"]
