"""A second request with the same long beginning: how much sooner its first token comes."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator

from serve_benchmark import servers
from serve_benchmark.clients import Ask, ask_once
from serve_benchmark.facts import Model, Row, Run, say, spread, target

N_PREFIX, N_OWN = 1000, 8


def run(run: Run) -> Iterator[Row]:
    """One row for each model."""
    yield from (_model(run, model) for model in run.models)


def _model(run: Run, model: Model) -> Row:
    n_prefix = 200 if run.quick else N_PREFIX
    setting = run.setting(model, n_slots=2, n_ctx=n_prefix + 64)
    times: dict[str, tuple[list[float], list[float]]] = {}
    with contextlib.ExitStack() as stack:
        maker = stack.enter_context(run.maker(model, seed=3))
        running = [
            stack.enter_context(servers.edgelora(setting)),
            stack.enter_context(
                servers.llama_server(run.peers, setting, unified=False, cache=True)
            ),
        ]
        for server in running:
            ask_once(server.port, server.protocol, Ask(maker.read("hello"), 4))
        for _ in range(run.rounds):
            (shared,) = maker.prompts(1, n_prefix)
            both = maker.prompts(2, n_prefix + N_OWN, after=shared)
            for server in running:
                firsts = times.setdefault(server.name, ([], []))
                for place, prompt in zip(firsts, both, strict=True):
                    # A reply of one token: a stream shows none that is a part of a character.
                    ask = Ask(prompt, 1, cached=True)
                    place.append(ask_once(server.port, server.protocol, ask).first_s)
    say(f"  {model.name}: done")
    rows = [
        {"system": name, "first_s": spread(first), "second_s": spread(second),
         "ratio": statistics.median(b / a for a, b in zip(first, second, strict=True))}
        for name, (first, second) in times.items()
    ]  # fmt: skip
    row: Row = {"part": "prefix", "model": model.name, "n_prefix": n_prefix, "n_own": N_OWN}
    bound = target("second first token, of the first", rows[0]["ratio"], most=0.1)
    return row | {"systems": rows, "targets": [bound]}
