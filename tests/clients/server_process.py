"""`edgelora serve` as a process of its own, as a person starts it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "build" / "demo" / "returns.gguf"
BASE_ID = "smollm2-135m-instruct"
_READY_S = 60.0


@dataclass(frozen=True)
class ServerProcess:
    """A running server: its address, its process, and what it has printed to stderr so far."""

    url: str
    process: subprocess.Popen[str]
    said: list[str]


@contextlib.contextmanager
def serve(*arguments: str, env: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """Start `edgelora serve` on a free port, wait until it can answer, end it with SIGTERM."""
    command = [sys.executable, "-m", "edgelora", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    reader = threading.Thread(target=_read, args=(process, said), daemon=True)
    reader.start()
    try:
        yield ServerProcess(_wait(process, said), process, said)
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            reader.join(10)
            if process.stderr is not None:
                process.stderr.close()


def _read(process: subprocess.Popen[str], said: list[str]) -> None:
    assert process.stderr is not None
    said.extend(iter(process.stderr.readline, ""))


def _wait(process: subprocess.Popen[str], said: list[str]) -> str:
    """The server's address, once GET /ready answers 200."""
    until = time.monotonic() + _READY_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError("the server ended:\n" + "".join(said))
        match = re.search(r"http://[\d.]+:\d+", "".join(said))
        if match:
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(f"{match[0]}/ready", timeout=5).close()
                return match[0]
        time.sleep(0.05)
    raise RuntimeError(f"the server is not ready after {_READY_S:.0f} s:\n" + "".join(said))


def asked(text: str) -> Any:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def held_out(n: int) -> list[dict[str, str]]:
    """The first lines of the example's held-out data: prompt and completion."""
    path = ROOT / "examples" / "returns" / "heldout.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:n]]
