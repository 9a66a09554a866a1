"""Eight clients at once: tokens a second and the last client's first token, beside the peers'."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from serve_benchmark import servers
from serve_benchmark.clients import Answer, Ask, ask_all, ask_once, counters
from serve_benchmark.facts import SMALL, Model, Row, Run, say, spread, target
from serve_benchmark.prompts import Prompt

N_CLIENTS, N_PROMPT = 8, 128
MODES = {False: "whole", True: "streamed"}


@dataclass
class _System:
    """One server with or without an adapter, and what was measured of it."""

    running: servers.Running
    adapter: str = ""
    asked: tuple[tuple[str, float], ...] | None = None
    total_s: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    first_s: list[float] = field(default_factory=list)
    host_us: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    def row(self) -> Row:
        """What is kept of it."""
        row: Row = {"system": self.running.name, "adapter": self.adapter}
        for streamed, mode in MODES.items():
            row[mode] = spread(self.total_s[streamed])
            if self.host_us[streamed]:
                row[f"{mode}_python_us"] = spread(self.host_us[streamed])
        return row | {"eighth_first_s": spread(self.first_s)}


def run(run: Run) -> Iterator[Row]:
    """One row for each model."""
    yield from (_model(run, model) for model in run.models)


def _model(run: Run, model: Model) -> Row:
    n_tokens = 8 if run.quick else 64
    setting = run.setting(model, n_slots=N_CLIENTS, n_ctx=256)
    bench: dict[bool, list[float]] = {False: [], True: []}
    with run.maker(model, seed=1) as maker, _systems(run, model) as systems:
        for system in systems:
            ask_once(system.running.port, system.running.protocol, Ask(maker.read("hello"), 4))
        for number in range(run.rounds):
            for unified in bench:
                speed = servers.batched_bench(
                    run.peers, setting, N_PROMPT, n_tokens, unified=unified
                )
                bench[unified].append(speed)
            for streamed in MODES:
                prompts = maker.prompts(N_CLIENTS, N_PROMPT)
                for i in range(len(systems)):
                    _measure(systems[(i + number) % len(systems)], prompts, n_tokens, streamed)
            say(f"  {model.name}: round {number + 1} of {run.rounds}")
        rows = [system.row() for system in systems]
    rows += [
        {"system": "llama-batched-bench" + " --kv-unified" * unified, "adapter": "",
         "whole": spread(speeds)}
        for unified, speeds in bench.items()
    ]  # fmt: skip
    row: Row = {"part": "parallel", "model": model.name, "n_clients": N_CLIENTS}
    row |= {"n_prompt": N_PROMPT, "n_tokens": n_tokens, "systems": rows}
    return row | {"targets": _targets(model, rows)}


@contextlib.contextmanager
def _systems(run: Run, model: Model) -> Iterator[list[_System]]:
    """Every server of the comparison, started and ready."""
    setting = run.setting(model, n_slots=N_CLIENTS, n_ctx=256)
    adapter = model.combined
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(servers.edgelora(setting, [adapter]))
        systems = [
            _System(ours, asked=()),
            _System(ours, adapter.stem, asked=((adapter.stem, 1.0),)),
        ]
        for unified in (False, True):
            for adapters in ([], [adapter]):
                theirs = servers.llama_server(
                    run.peers, setting, adapters, unified=unified, cache=False
                )
                name = adapter.stem if adapters else ""
                systems.append(_System(stack.enter_context(theirs), name))
        python = stack.enter_context(servers.llama_cpp_server(run.peers, setting))
        yield [*systems, _System(python)]


def _measure(system: _System, prompts: list[Prompt], n_tokens: int, streamed: bool) -> None:
    """One round of one system: all clients at once."""
    running = system.running
    asks = [Ask(prompt, n_tokens, streamed, system.asked) for prompt in prompts]
    before = counters(running.port)
    answers = ask_all(running.port, running.protocol, asks)
    after = counters(running.port)
    _check(running.name, answers, n_tokens)
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
