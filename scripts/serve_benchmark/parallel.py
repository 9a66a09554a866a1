"""Eight clients at once: tokens a second and the last client's first token, beside the peers'.

In every round each server is a process of its own that has just been started, in turn the first, as
in `single`: how fast a process is differs by some percent with where its pages lie.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from serve_benchmark import servers
from serve_benchmark.clients import Answer, Ask, ask_all, counters
from serve_benchmark.facts import SMALL, Model, Row, Run, say, spread, target
from serve_benchmark.prompts import Prompt

N_CLIENTS, N_PROMPT = 8, 128
REST_S = 3  # after a process that has given a gigabyte back
MODES = {False: "whole", True: "streamed"}


@dataclass
class _System:
    """One server with or without an adapter, and what was measured of it."""

    name: str
    adapter: str = ""
    asked: tuple[tuple[str, float], ...] | None = None
    total_s: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    first_s: list[float] = field(default_factory=list)
    host_us: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    def row(self) -> Row:
        """What is kept of it."""
        row: Row = {"system": self.name, "adapter": self.adapter}
        for streamed, mode in MODES.items():
            row[mode] = spread(self.total_s[streamed])
            if self.host_us[streamed]:
                row[f"{mode}_python_us"] = spread(self.host_us[streamed])
        return row | {"eighth_first_s": spread(self.first_s)}


@dataclass(frozen=True)
class _Server:
    """How a server is started, and what is measured of it while it runs."""

    start: Callable[[], AbstractContextManager[servers.Running]]
    systems: tuple[_System, ...]


def run(run: Run) -> Iterator[Row]:
    """One row for each model."""
    yield from (_model(run, model) for model in run.models)


def _model(run: Run, model: Model) -> Row:
    n_tokens = 8 if run.quick else 64
    setting = run.setting(model, n_slots=N_CLIENTS, n_ctx=256)
    bench: dict[bool, list[float]] = {False: [], True: []}
    compared = _servers(run, model)
    with run.maker(model, seed=1) as maker:
        for number in range(run.rounds):
            for unified in bench:
                speed = servers.batched_bench(
                    run.peers, setting, N_PROMPT, n_tokens, unified=unified
                )
                bench[unified].append(speed)
            prompts = {streamed: maker.prompts(N_CLIENTS, N_PROMPT) for streamed in MODES}
            for i in range(len(compared)):
                server = compared[(i + number) % len(compared)]
                _measure_server(server, maker.read("hello"), prompts, n_tokens)
                time.sleep(0 if run.quick else REST_S)
            say(f"  {model.name}: round {number + 1} of {run.rounds}")
    rows = [system.row() for server in compared for system in server.systems]
    rows += [
        {"system": "llama-batched-bench" + " --kv-unified" * unified, "adapter": "",
         "whole": spread(speeds)}
        for unified, speeds in bench.items()
    ]  # fmt: skip
    row: Row = {"part": "parallel", "model": model.name, "n_clients": N_CLIENTS}
    row |= {"n_prompt": N_PROMPT, "n_tokens": n_tokens, "systems": rows}
    return row | {"targets": _targets(model, rows)}


def _servers(run: Run, model: Model) -> list[_Server]:
    """Every server of the comparison; ours has the adapter beside the base, llama-server or not."""
    setting = run.setting(model, n_slots=N_CLIENTS, n_ctx=256)
    adapter = model.combined
    systems = (_System("edgelora", "", ()),
               _System("edgelora", adapter.stem, ((adapter.stem, 1.0),)))  # fmt: skip
    found = [_Server(partial(servers.edgelora, setting, [adapter]), systems)]
    for unified in (False, True):
        for adapters in ([], [adapter]):
            start = partial(
                servers.llama_server, run.peers, setting, adapters, unified=unified, cache=False
            )
            name = "llama-server" + " --kv-unified" * unified
            found.append(_Server(start, (_System(name, adapter.stem if adapters else ""),)))
    python = partial(servers.llama_cpp_server, run.peers, setting)
    return [*found, _Server(python, (_System("llama_cpp.server"),))]


def _measure_server(
    server: _Server, warm_up: Prompt, prompts: dict[bool, list[Prompt]], n_tokens: int
) -> None:
    """One round of one server: all clients at once, whole answers and then streams."""
    with server.start() as running:
        for system in server.systems:
            ask_all(running.port, running.protocol, [Ask(warm_up, 4, adapters=system.asked)] * 2)
        for streamed in MODES:
            for system in server.systems:
                _measure(running, system, prompts[streamed], n_tokens, streamed)


def _measure(
    running: servers.Running,
    system: _System,
    prompts: list[Prompt],
    n_tokens: int,
    streamed: bool,
) -> None:
    asks = [Ask(prompt, n_tokens, streamed, system.asked) for prompt in prompts]
    before = counters(running.port)
    answers = ask_all(running.port, running.protocol, asks)
    after = counters(running.port)
    _check(system.name, answers, n_tokens)
    elapsed_s = max(a.done for a in answers) - min(a.sent for a in answers)
    system.total_s[streamed].append(len(answers) * (N_PROMPT + n_tokens) / elapsed_s)
    if streamed:
        system.first_s.append(max(answer.first_s for answer in answers))
    host = "edgelora_host_seconds_total"
    if host in after:
        used_s = after[host] - before[host]
        system.host_us[streamed].append(1e6 * used_s / (len(answers) * n_tokens))


def _check(name: str, answers: list[Answer], n_tokens: int) -> None:
    """A server that answers less, or has the prompt from its cache, is not measured.

    Raises:
        SystemExit: with the numbers of tokens.
    """
    for answer in answers:
        # llama_cpp.server's streams say no number of tokens; parts of a character are no event.
        is_counted = name != "llama_cpp.server" or len(answer.at) == 1
        short = answer.n_generated < n_tokens * (1 if is_counted else 0.25)
        # llama_cpp.server counts no prompt in a stream; one cached token is the BOS.
        wrong = answer.n_prompt not in (0, N_PROMPT) or answer.n_cached > 1
        if short or wrong:
            raise SystemExit(
                f"{name}: {answer.n_generated} of {n_tokens} tokens, prompt of {answer.n_prompt} "
                f"({answer.n_cached} cached)"
            )


def _targets(model: Model, rows: list[Row]) -> list[Row]:
    ours = _best(rows, "edgelora", False)["whole"]["median"]
    hot = _best(rows, "edgelora", True)["whole"]["median"]
    server = _best(rows, "llama-server", False)["whole"]["median"]
    server_hot = _best(rows, "llama-server", True)["whole"]["median"]
    bench = _best(rows, "llama-batched-bench", False)["whole"]["median"]
    python = _best(rows, "llama_cpp.server", False)
    first = _best(rows, "edgelora", False)["eighth_first_s"]["median"]
    small = model.name == SMALL
    return [
        target("of llama-batched-bench", ours / bench, least=None if small else 0.9),
        target("of llama-server", ours / server, least=0.8 if small else 0.95),
        target("of llama-server, one adapter", hot / server_hot, least=None if small else 0.95),
        target("of llama_cpp.server", ours / python["whole"]["median"]),
        target(
            "8th client's first token, of llama_cpp.server's",
            first / python["eighth_first_s"]["median"],
            most=0.5,
        ),
    ]


def _best(rows: list[Row], system: str, adapted: bool) -> Row:
    """The faster way of running one system."""
    found = [
        r for r in rows if r["system"].split(" --")[0] == system and bool(r["adapter"]) == adapted
    ]
    return max(found, key=lambda row: row["whole"]["median"])
