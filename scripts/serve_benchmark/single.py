"""One client: decode speed beside llama-bench's, and what adapters cost while decoding."""

from __future__ import annotations

import contextlib
import statistics

from serve_benchmark import servers
from serve_benchmark.clients import Ask, ask_once, counters
from serve_benchmark.facts import SMALL, Model, Row, Run, say, spread, target

DEPTH = 128
LEAST_MS = 1e-3  # a cost that drowns in the noise is not 0 or less


def run(run: Run) -> list[Row]:
    """One row for each model."""
    return [_model(run, model) for model in run.models]


def _model(run: Run, model: Model) -> Row:
    n_tokens = 16 if run.quick else 128
    setting = run.setting(model, n_slots=1, n_ctx=512)
    weight = 1.0 / len(model.sources)
    sets = {
        "": (),
        f"combined, rank {model.rank}": ((model.combined.stem, 1.0),),
        f"{len(model.sources)} sources, rank {model.rank} each": tuple(
            (path.stem, weight) for path in model.sources
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sets}
    bench, server_speeds = [], []
    with contextlib.ExitStack() as stack:
        maker = stack.enter_context(run.maker(model, seed=2))
        ours = stack.enter_context(servers.edgelora(setting, [*model.sources, model.combined]))
        theirs = stack.enter_context(
            servers.llama_server(run.peers, setting, unified=False, cache=False)
        )
        for adapters in sets.values():
            ask_once(ours.port, ours.protocol, Ask(maker.read("hello"), 4, adapters=adapters))
        before = counters(ours.port)
        for number in range(run.rounds):
            bench.append(servers.bench_decode(run.peers, setting, DEPTH, n_tokens))
            (prompt,) = maker.prompts(1, DEPTH)
            for name, adapters in sets.items():
                ask = Ask(prompt, n_tokens, True, adapters)
                speeds[name].append(ask_once(ours.port, ours.protocol, ask).tokens_s)
            ask = Ask(prompt, n_tokens, True)
            server_speeds.append(ask_once(theirs.port, theirs.protocol, ask).tokens_s)
            say(f"  {model.name}: round {number + 1} of {run.rounds}")
        after = counters(ours.port)
    rows = [
        {"system": "edgelora", "adapter": name, "decode": spread(values)}
        for name, values in speeds.items()
    ]
    rows.append({"system": "llama-server", "adapter": "", "decode": spread(server_speeds)})
    rows.append({"system": "llama-bench tg", "adapter": "", "decode": spread(bench)})
    row: Row = {"part": "single", "model": model.name, "n_prompt": DEPTH, "n_tokens": n_tokens}
    row |= {"systems": rows, "python_us": _python_us(before, after)}
    return row | _costs(model, speeds, bench)


def _costs(model: Model, speeds: dict[str, list[float]], bench: list[float]) -> Row:
    """Milliseconds that a set adds to each token; the difference of one round's own speeds."""
    base, *adapted = speeds
    costs = {
        name: statistics.median(
            1e3 / fast - 1e3 / plain for fast, plain in zip(speeds[name], speeds[base], strict=True)
        )
        for name in adapted
    }
    one, four = costs.values()
    ratio = statistics.median(speeds[base]) / statistics.median(bench)
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
