"""Offline: no socket of Python speaks to another machine, whatever is tried."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import builds
import pico
import pytest
from cli_runner import run

from edgelora.errors import HubError
from edgelora.hub.offline import is_offline, offline

# Every socket event of the interpreter is written down; `edgelora` then runs as a person runs it.
TRAP = """
import json, sys
seen = []
def note(event, arguments):
    if event.startswith("socket."):
        seen.append(event)
sys.addaudithook(note)
from edgelora.cli.main import main
try:
    main()
finally:
    open({log!r}, "w").write(json.dumps(seen))
"""
TALK = {"socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname"}


def trapped(folder: Path, *words: object, **variables: str) -> tuple[int, str, set[str]]:
    """Exit code, stderr, and the socket events of `edgelora WORDS` in a process of its own."""
    log = folder / "events.json"
    command = [sys.executable, "-c", TRAP.format(log=str(log)), *map(str, words)]
    environment = {**os.environ, "EDGELORA_CACHE": str(folder / "cache"), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr, set(json.loads(log.read_text()))


@pytest.mark.slow
def test_commands_on_local_files_open_no_socket(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    folder = pico.write_peft(tmp_path / "adapter", seed=1)
    data = builds.write_lines(tmp_path / "d.jsonl", ["is it", "was it", "they"], ["a", "b", "c"])
    bank, adapter = tmp_path / "bank", tmp_path / "bank" / "adapters" / "one.gguf"
    lines = (
        ("bank", "add", folder, "--name", "one", "--bank", bank, "--base", base, "--data", data),
        ("eval", "--base", base, "--adapter", adapter, "--data", data, "--no-generate"),
        ("pull", "base", "--local"),
    )
    for words in lines:
        code, stderr, events = trapped(tmp_path, *words, "--offline")
        assert code == 0, stderr
        assert not events & TALK, (words, events)


@pytest.mark.parametrize(
    ("name", "variables", "flag"),
    [
        ("mistral-7b-instruct-v0.2", {"EDGELORA_OFFLINE": "1"}, ()),
        ("org/name", {"HF_HUB_OFFLINE": "true"}, ()),
        ("org/name", {}, ("--offline",)),
    ],
)
def test_pull_refuses_before_any_socket(
    name: str, variables: dict[str, str], flag: tuple[str, ...], tmp_path: Path
) -> None:
    variables = {**variables, "EDGELORA_MODELS": str(tmp_path / "models")}
    code, stderr, events = trapped(tmp_path, "pull", "base", name, *flag, **variables)
    assert code == 1 and "needs the network, and this is offline" in stderr
    assert events == set() and not (tmp_path / "models").exists()


@pytest.mark.slow
def test_pull_bank_refuses_too(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    code, stderr, events = trapped(
        tmp_path, "pull", "bank", "org/name", "--base", base, "--bank", tmp_path / "bank",
        "--offline",
    )  # fmt: skip
    assert code == 1 and events == set(), stderr


def test_what_tries_all_the_same_is_stopped() -> None:
    with offline(), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        with pytest.raises(HubError, match="192.0.2.1: a connection to it was tried"):
            tcp.connect(("192.0.2.1", 80))
        with pytest.raises(HubError, match="example.invalid"):
            socket.getaddrinfo("example.invalid", 443)
        with pytest.raises(HubError, match="example.invalid"):
            socket.getaddrinfo(b"example.invalid", 443)
        with pytest.raises(HubError, match="example.invalid"):
            socket.gethostbyname("example.invalid")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            with pytest.raises(HubError, match="192.0.2.1"):
                udp.sendto(b"x", ("192.0.2.1", 53))
    assert not is_offline()


def test_this_machine_can_be_spoken_to() -> None:
    with offline(), socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
        port = server.getsockname()[1]
        socket.create_connection(("localhost", port)).close()
        assert socket.getaddrinfo("192.0.2.1", 80) and socket.getaddrinfo(None, 80)
        one, other = socket.socketpair()
        one.close()
        other.close()


def test_it_ends_with_the_block_and_the_environment_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGELORA_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with offline(False):
        assert not is_offline()
    with offline():
        assert is_offline()
    assert os.environ["EDGELORA_OFFLINE"] == "0"
    result = run("pull", "base", "org/name", "--offline")
    assert result.exit_code == 1 and "without --offline" in result.stderr and not is_offline()
