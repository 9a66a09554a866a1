"""One client: decode speed beside llama-bench's, and what adapters cost while decoding.

In every round each system is a process of its own that has just been started, in turn the first:
a machine's speed drifts by more than what is compared, and differs with where a process' pages lie.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from build_peers import Peers

from serve_benchmark import servers
from serve_benchmark.clients import Ask, ask_once, counters
from serve_benchmark.facts import SMALL, Model, Row, Run, say, spread, target
from serve_benchmark.prompts import Prompt

DEPTH = 128
N_WARM = 16
REST_S = 3  # after a process that has given a gigabyte back
Adapters = tuple[tuple[str, float], ...] | None  # None: what the server was started with
Sets = Mapping[str, tuple[tuple[str, float], ...]]
LEAST_MS = 1e-3  # a cost that drowns in the noise is not 0 or less


def run(run: Run) -> Iterator[Row]:
    """One row for each model."""
    yield from (_model(run, model) for model in run.models)


@dataclass
class _Speeds:
    """Tokens a second in each round, by adapter set; and of a stream without adapters."""

    by_set: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    streamed: list[float] = field(default_factory=list)


def _model(run: Run, model: Model) -> Row:
    n_tokens = 16 if run.quick else 64
    weight = 1.0 / len(model.sources)
    sets: Sets = {
        "": (),
        f"combined, rank {model.rank}": ((model.combined.stem, 1.0),),
        f"{len(model.sources)} sources, rank {model.rank} each": tuple(
            (path.stem, weight) for path in model.sources
        ),
    }
    ours, theirs, bench = _Speeds(), _Speeds(), _Speeds()
    used: list[Row] = []
    setting = run.setting(model, n_slots=1, n_ctx=512)
    with run.maker(model, seed=2) as maker:
        for number in range(run.rounds):
            (prompt,) = maker.prompts(1, DEPTH)
            measures: list[Callable[[Prompt], None]] = [
                lambda _: bench.by_set[""].append(
                    servers.bench_decode(run.peers, setting, DEPTH, n_tokens)
                ),
                lambda prompt: used.append(_edgelora(setting, model, sets, prompt, n_tokens, ours)),
                lambda prompt: _llama_server(run.peers, setting, prompt, n_tokens, theirs),
            ]
            for i in range(len(measures)):
                measures[(number + i) % len(measures)](prompt)
                time.sleep(0 if run.quick else REST_S)
            say(f"  {model.name}: round {number + 1} of {run.rounds}")
    rows = []
    for name, speeds in (("edgelora", ours), ("llama-server", theirs), ("llama-bench tg", bench)):
        for adapters, values in speeds.by_set.items():
            rows.append({"system": name, "adapter": adapters, "decode": spread(values)})
            if speeds.streamed and not adapters:
                rows[-1]["streamed"] = spread(speeds.streamed)
    row: Row = {"part": "single", "model": model.name, "n_prompt": DEPTH, "n_tokens": n_tokens}
    row |= {
        "systems": rows,
        "python_us": {k: statistics.median(u[k] for u in used) for k in used[0]},
    }
    return row | _costs(model, ours.by_set, bench.by_set[""])


def _edgelora(
    setting: servers.Setting,
    model: Model,
    sets: Sets,
    prompt: Prompt,
    n_tokens: int,
    speeds: _Speeds,
) -> Row:
    """One round of `edgelora serve`; microseconds that a token took, by part."""
    with servers.edgelora(setting, [*model.sources, model.combined]) as running:
        before = counters(running.port)
        found = {name: [_decode_speed(running, prompt, n_tokens, sets[name])] for name in sets}
        used = _python_us(before, counters(running.port))
        speeds.streamed.append(_streamed_speed(running, prompt, n_tokens, ()))
        for name in sets:  # what a set costs is a small difference: once more
            found[name].append(_decode_speed(running, prompt, n_tokens, sets[name]))
    for name, values in found.items():
        speeds.by_set[name].append(statistics.harmonic_mean(values))
    return used


def _llama_server(
    peers: Peers, setting: servers.Setting, prompt: Prompt, n_tokens: int, speeds: _Speeds
) -> None:
    with servers.llama_server(peers, setting, unified=False, cache=True) as running:
        speeds.by_set[""].append(_decode_speed(running, prompt, n_tokens, None))
        speeds.streamed.append(_streamed_speed(running, prompt, n_tokens, None))


def _streamed_speed(
    server: servers.Running, prompt: Prompt, n_tokens: int, adapters: Adapters
) -> float:
    ask = Ask(prompt, n_tokens, True, adapters, cached=True)
    return ask_once(server.port, server.protocol, ask).tokens_s


def _decode_speed(
    server: servers.Running, prompt: Prompt, n_tokens: int, adapters: Adapters
) -> float:
    """Tokens a second of one client that reads the whole answer.

    The prompt is computed first, and some tokens, as what has idled is slow for a while. Then a
    short answer is taken from a long one, so that what a request costs besides its tokens is in
    neither.
    """

    def seconds(n: int) -> float:
        ask = Ask(prompt, n, adapters=adapters, cached=True)
        answer = ask_once(server.port, server.protocol, ask)
        return answer.done - answer.sent

    seconds(N_WARM)
    short = statistics.median(seconds(1) for _ in range(3))
    return n_tokens / (seconds(1 + n_tokens) - short)


def _costs(model: Model, speeds: Mapping[str, list[float]], bench: list[float]) -> Row:
    """Milliseconds that a set adds to each token; the difference of one round's own speeds."""
    base, *adapted = speeds
    costs = {
        name: statistics.median(
            1e3 / fast - 1e3 / plain for fast, plain in zip(speeds[name], speeds[base], strict=True)
        )
        for name in adapted
    }
    one, four = costs.values()
    ratio = statistics.median(own / b for own, b in zip(speeds[base], bench, strict=True))
    bound = None if model.name == SMALL else 0.97
    targets = [
        target("decode speed, of llama-bench's tg", ratio, least=bound),
        target(
            "cost of the sources, of the combined one's",
            four / max(one, LEAST_MS),
            least=None if model.name == SMALL else 2.5,
        ),
    ]
    return {"cost_ms": costs, "targets": targets}


def _python_us(before: dict[str, float], after: dict[str, float]) -> Row:
    """Microseconds a token of ours: Python, llama.cpp's samplers and llama_decode."""
    n = after["llamacpp:tokens_predicted_total"] - before["llamacpp:tokens_predicted_total"]
    names = {"python": "host", "sample": "sample", "decode": "decode"}
    keys = {name: f"edgelora_{key}_seconds_total" for name, key in names.items()}
    return {name: 1e6 * (after[key] - before[key]) / n for name, key in keys.items()}
