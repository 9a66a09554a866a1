"""The servers and tools that are compared: how each is started, on the same file and threads."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from build_peers import Peers

from edgelora.gguf_file import open_gguf
from serve_benchmark.clients import LlamaCppPython, LlamaServer, OpenAI, Protocol, get

START_S = 180


@dataclass(frozen=True)
class Setting:
    """What all of them are started with.

    Attributes:
        n_ctx: tokens of one request, prompt and answer.
    """

    base: Path
    n_threads: int
    n_slots: int = 8
    n_ctx: int = 256


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    name: str
    port: int
    protocol: Protocol
    started_s: float
    pid: int


@contextlib.contextmanager
def edgelora(
    setting: Setting, adapters: Sequence[Path] = (), *, options: Sequence[str] = ()
) -> Iterator[Running]:
    """`edgelora serve` of this checkout."""
    command = [sys.executable, "-m", "edgelora", "serve", "--base", str(setting.base)]
    command += ["--threads", str(setting.n_threads), "--slots", str(setting.n_slots)]
    command += ["--context", str(setting.n_ctx), *options]
    for adapter in adapters:
        command += ["--adapter", str(adapter)]
    with _server("edgelora", command, OpenAI(), "/ready") as running:
        yield running


@contextlib.contextmanager
def llama_server(
    peers: Peers, setting: Setting, adapters: Sequence[Path] = (), *, unified: bool, cache: bool
) -> Iterator[Running]:
    """llama-server, with one KV buffer for all slots or one for each."""
    command = [str(peers.program("llama-server")), "-m", str(setting.base), "--offline"]
    command += ["-t", str(setting.n_threads), "-np", str(setting.n_slots), "--no-ui"]
    command += ["-c", str(setting.n_slots * setting.n_ctx)]
    command += ["--kv-unified" if unified else "--no-kv-unified"]
    command += [] if cache else ["--no-cache-prompt", "--cache-ram", "0"]
    if adapters:
        command += ["--lora", ",".join(map(str, adapters))]
    name = "llama-server" + (" --kv-unified" if unified else "")
    with _server(name, command, LlamaServer(), "/health") as running:
        yield running


@contextlib.contextmanager
def llama_cpp_server(peers: Peers, setting: Setting) -> Iterator[Running]:
    """llama_cpp.server, which finishes an answer before it begins the next."""
    options = {
        "model": setting.base, "n_ctx": setting.n_ctx, "n_threads": setting.n_threads,
        "n_threads_batch": setting.n_threads, "interrupt_requests": "false", "verbose": "false",
        "logits_all": "false", "use_mlock": "false",
    }  # fmt: skip
    command = [str(peers.python), "-m", "llama_cpp.server", "--host", "127.0.0.1"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    protocol = LlamaCppPython(int(open_gguf(setting.base).metadata["tokenizer.ggml.eos_token_id"]))
    with _server("llama_cpp.server", command, protocol, "/v1/models") as running:
        yield running


@contextlib.contextmanager
def _server(name: str, command: Sequence[str], protocol: Protocol, ready: str) -> Iterator[Running]:
    """Start a server on a free port, wait until it can answer, and end it with the block."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            wait_until_ready(process, port, ready, log)
            yield Running(name, port, protocol, time.perf_counter() - started, process.pid)
        finally:
            end(process)


def wait_until_ready(
    process: subprocess.Popen[bytes], port: int, path: str, log: IO[bytes]
) -> None:
    """Poll `path` until it answers 200.

    Raises:
        SystemExit: the process ended, or took too long; its last words are in the message.
    """
    deadline = time.perf_counter() + START_S
    while get(port, path)[0] != 200:
        if process.poll() is not None or time.perf_counter() > deadline:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 3000))
            words = log.read().decode(errors="replace")
            raise SystemExit(f"{' '.join(map(str, process.args))}\ndid not start:\n{words}")
        time.sleep(0.01)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to end, and end it if it does not."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def batched_bench(
    peers: Peers, setting: Setting, n_prompt: int, n_tokens: int, *, unified: bool
) -> float:
    """Tokens a second, prompts and answers, of llama-batched-bench at this shape."""
    command = [str(peers.program("llama-batched-bench")), "-m", str(setting.base)]
    command += ["-t", str(setting.n_threads), "-c", str(setting.n_slots * setting.n_ctx)]
    command += ["-npp", str(n_prompt), "-ntg", str(n_tokens), "-npl", str(setting.n_slots)]
    command += ["--kv-unified" if unified else "--no-kv-unified", "--output-format", "jsonl"]
    rows = [line for line in _output(command).splitlines() if line.startswith("{")]
    return float(json.loads(rows[-1])["speed"])


def bench_decode(peers: Peers, setting: Setting, depth: int, n_tokens: int) -> float:
    """Tokens a second of llama-bench's tg after `depth` tokens."""
    command = [str(peers.program("llama-bench")), "-m", str(setting.base), "-o", "json"]
    command += ["-t", str(setting.n_threads), "-p", "0", "-n", str(n_tokens)]
    command += ["-d", str(depth), "-r", "3"]
    (row,) = json.loads(_output(command))
    return statistics.median(row["samples_ts"])


def bench_prompt(peers: Peers, setting: Setting, n_tokens: int) -> float:
    """Tokens a second of llama-bench's pp: one prompt, the head on its last token only."""
    command = [str(peers.program("llama-bench")), "-m", str(setting.base), "-o", "json"]
    command += ["-t", str(setting.n_threads), "-p", str(n_tokens), "-n", "0"]
    command += ["-b", "512", "-ub", "512", "-fa", "1", "-r", "1"]
    (row,) = json.loads(_output(command))
    return float(row["avg_ts"])


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{done.stderr[-3000:]}")
    return done.stdout
