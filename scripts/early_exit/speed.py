"""Embedding against llama-cpp-python's own and llama-bench's pp, in one run, by layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from build_peers import Peers
from serve_benchmark.servers import Setting, bench_prompt

from edgelora.engine.context import open_context
from edgelora.engine.embed import WINDOW, embed
from edgelora.engine.model import ModelOptions, open_model
from edgelora.summarise import embedded_ids

REFERENCE, BENCH = "llama-cpp-python", "llama-bench"
FLOOR = 0.9  # of n_layer / n_layers
BENCH_FLOOR = 0.95


def measure_speed(
    path: Path,
    texts: Sequence[str],
    depths: Sequence[int],
    rounds: int,
    n_threads: int,
    peers: Peers | None = None,
) -> dict[str, Any]:
    """Tokens a second: the fastest of `rounds`, in which each system has its turn.

    Texts of more than a window are left out: llama-cpp-python would cut them. With `peers`,
    llama-bench reads one prompt of as many tokens in each round, and times itself.
    """
    options = ModelOptions(n_threads=n_threads)
    with open_model(path, options) as model, open_context(model, hidden=True) as context:
        vocabulary, n_layer = model.vocabulary, model.base.n_layer
        used = [t for t in texts if 0 < len(embedded_ids(vocabulary, t)) <= WINDOW]
        n_tokens = sum(len(embedded_ids(vocabulary, text)) for text in used)
        theirs = _open_llama(path, n_threads)
        vectors: dict[str, Any] = {}

        def ours(depth: int) -> None:
            ids = [embedded_ids(vocabulary, text) for text in used]
            vectors[str(depth)] = embed(context, ids, depth)

        systems: dict[str, Callable[[], object]] = {
            REFERENCE: lambda: vectors.update(theirs=theirs.embed(used)),
            **{str(depth): lambda depth=depth: ours(depth) for depth in depths},
        }
        if peers is not None:
            setting = Setting(path, n_threads)
            systems[BENCH] = lambda: n_tokens / bench_prompt(peers, setting, n_tokens)
        seconds = _take_turns(systems, rounds)
    best = {name: min(times) for name, times in seconds.items()}
    drift = np.linalg.norm(vectors["0"] - np.array(vectors["theirs"])) / np.linalg.norm(
        vectors["0"]
    )
    return {
        "n_layer": n_layer, "n_texts": len(used), "n_tokens": n_tokens, "rounds": rounds,
        "n_threads": n_threads, "difference": float(drift),
        "theirs": n_tokens / best[REFERENCE],
        **({"bench": n_tokens / best[BENCH], "of_bench": best[BENCH] / best["0"],
            "of_bench_median": _median_ratio(seconds, BENCH)} if BENCH in best else {}),
        "of_theirs": best[REFERENCE] / best["0"],
        "of_theirs_median": _median_ratio(seconds, REFERENCE),
        "depths": [
            {"n_layers": depth or n_layer, "tokens_per_s": n_tokens / best[str(depth)],
             "of_all": best["0"] / best[str(depth)],
             "of_theirs": best[REFERENCE] / best[str(depth)],
             "of_layers": (best["0"] / best[str(depth)]) / (n_layer / (depth or n_layer))}
            for depth in sorted(depths, key=lambda d: d or n_layer)
        ],
    }  # fmt: skip


def _median_ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Seconds of `name` over those of all layers by ours, the median of the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds["0"], strict=True))


def _open_llama(path: Path, n_threads: int) -> llama_cpp.Llama:
    """Its own packing of texts, and means over tokens, which are what we compute."""
    return llama_cpp.Llama(
        str(path), embedding=True, n_ctx=WINDOW, n_batch=WINDOW, n_ubatch=WINDOW, verbose=False,
        n_threads=n_threads, n_threads_batch=n_threads,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
    )  # fmt: skip


def _take_turns(systems: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Every round runs all of them, after one that is not counted; seconds, or what one told."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, run in systems.items():
            started = time.perf_counter()
            told = run()
            if number:
                took = time.perf_counter() - started
                seconds[name].append(told if isinstance(told, float) else took)
    return seconds
