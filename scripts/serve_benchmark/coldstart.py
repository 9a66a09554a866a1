"""From the command to the first token, and to readiness with a large file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from serve_benchmark import servers
from serve_benchmark.clients import Ask, ask_once
from serve_benchmark.facts import Model, Row, Run, say, shaped_model, spread, target

LARGE = "mistral-7b"
PIECE = 64 << 20


def run(run: Run) -> Iterator[Row]:
    """SmolLM2 with an adapter to its first token; a 4 GB file until it is ready."""
    yield _first_token(run, run.models[0])
    yield _ready(run)


def _first_token(run: Run, model: Model) -> Row:
    setting = run.setting(model, n_slots=4, n_ctx=1024)
    with run.maker(model, seed=4) as maker:
        (prompt,) = maker.prompts(1, 32)
    _read_through(model.path)
    times: dict[str, list[float]] = {}
    for _ in range(run.rounds):
        adapter = model.combined
        for name, server, adapters in (
            ("edgelora", servers.edgelora(setting, [adapter]), ((adapter.stem, 1.0),)),
            (
                "llama-server",
                servers.llama_server(run.peers, setting, [adapter], unified=False, cache=False),
                None,
            ),
        ):
            with server as running:
                answer = ask_once(running.port, running.protocol, Ask(prompt, 2, True, adapters))
                elapsed_s = running.started_s + answer.first_s
            times.setdefault(name, []).append(elapsed_s)
    rows = [{"system": name, "seconds": spread(values)} for name, values in times.items()]
    bound = target("seconds to the first token", rows[0]["seconds"]["median"], most=2.0)
    say(f"  {model.name}: done")
    row: Row = {"part": "coldstart", "model": model.name, "until": "first token, one adapter"}
    return row | {"systems": rows, "targets": [bound]}


def _ready(run: Run) -> Row:
    model = run.models[-1] if run.quick else shaped_model(run.folder, LARGE)
    setting = run.setting(model, n_slots=1, n_ctx=1024)
    _read_through(model.path)
    ways: dict[str, contextlib.AbstractContextManager[servers.Running]] = {}
    times: dict[str, list[float]] = {}
    for _ in range(run.rounds):
        ways = {
            "edgelora": servers.edgelora(setting),
            "edgelora --low-ram": servers.edgelora(setting, options=["--low-ram"]),
            "llama-server": servers.llama_server(run.peers, setting, unified=False, cache=False),
        }
        for name, server in ways.items():
            with server as running:
                times.setdefault(name, []).append(running.started_s)
    rows = [{"system": name, "seconds": spread(values)} for name, values in times.items()]
    bound = target("seconds until ready", rows[0]["seconds"]["median"], most=5.0)
    say(f"  {model.name}: done")
    row: Row = {"part": "coldstart", "model": model.name, "until": "ready, file in the page cache"}
    row["file_bytes"] = model.path.stat().st_size
    return row | {"systems": rows, "targets": [bound]}


def _read_through(path: Path) -> None:
    """Put a file's pages in the cache."""
    with path.open("rb") as file:
        while file.read(PIECE):
            pass
