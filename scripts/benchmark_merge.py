"""Time and memory of a merge at Mistral-7B size (q,k,v), on one core, against the targets.

    python scripts/benchmark_merge.py FOLDER [--adapters 8] [--rank 16] [--to 16]

The adapters are made in FOLDER first, if they are not there. For comparison one tensor is merged as
PEFT's `svd` does it, by a full SVD of the dense update. Peak memory is RssAnon of /proc, sampled
every 5 ms; where there is no /proc, the resident size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from make_shape import SHAPES, write_gguf_lora
from measure_memory import anonymous

from edgelora.adapters.combine import combine
from edgelora.adapters.gguf_lora import open_lora
from edgelora.adapters.merge import merge_adapters, one_blas_thread

MAX_SECONDS = 10.0
MAX_ANONYMOUS_MB = 400.0
COMPARED = "blk.0.attn_k.weight"


@contextmanager
def watched_memory() -> Iterator[list[float]]:
    """A list whose first entry is the peak once the block has ended."""
    process = psutil.Process()
    peak = [anonymous(process) / 1e6]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous(process) / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def compare_one(paths: list[Path], weights: list[float], rank: int) -> dict[str, float]:
    """One tensor by a dense float32 SVD, as PEFT makes it, and by ours."""
    sources = [open_lora(path) for path in paths]
    started = time.perf_counter()
    dense = sum(
        np.float32(w * s.pair(COMPARED).scale)
        * (s.pair(COMPARED).lora_b.astype(np.float32) @ s.pair(COMPARED).lora_a.astype(np.float32))
        for s, w in zip(sources, weights, strict=True)
    )
    values = np.linalg.svd(dense, full_matrices=False)[1]
    dense_s = time.perf_counter() - started

    class Only:
        def __init__(self, source: object) -> None:
            self.plan = {COMPARED: source.plan[COMPARED]}
            self.pair = source.pair

    started = time.perf_counter()
    made = combine("svd", [Only(source) for source in sources], weights, rank=rank)
    list(made.pairs())
    ours_s = time.perf_counter() - started
    best = float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))
    return {"dense_s": dense_s, "ours_s": ours_s, "dense_error": best, "ours_error": made.error}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16, help="of the sources")
    parser.add_argument("--to", type=int, default=16, help="rank of the result")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(options.adapters):
        paths.append(options.folder / f"{options.shape}-r{options.rank}-{i}.gguf")
        if not paths[-1].exists():
            write_gguf_lora(paths[-1], SHAPES[options.shape], rank=options.rank, seed=i)
    weights = [1.0 / options.adapters] * options.adapters
    out = options.folder / "merged.gguf"
    seconds, cpu = [], []
    with one_blas_thread():
        for _ in range(options.runs):
            started, used = time.perf_counter(), time.process_time()
            with watched_memory() as peak:
                report = merge_adapters(paths, weights, out, rank=options.to, force=True)
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
        one = compare_one(paths, weights, options.to)
    result = {
        "shape": options.shape, "adapters": options.adapters, "rank": options.rank,
        "to": options.to, "tensors": len(report.tensors), "error": report.error,
        "seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu),
        "peak_anonymous_mb": peak[0], "max_seconds": MAX_SECONDS,
        "max_anonymous_mb": MAX_ANONYMOUS_MB, "one_tensor": {"name": COMPARED, **one},
    }  # fmt: skip
    met = result["seconds"] <= MAX_SECONDS and result["peak_anonymous_mb"] <= MAX_ANONYMOUS_MB
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{options.adapters} adapters of rank {options.rank} -> {options.to}, {options.shape}"
        )
        print(f"  time    {result['seconds']:7.2f} s of one core (target {MAX_SECONDS:g} s)")
        print(f"  memory  {peak[0]:7.0f} MB anonymous (target {MAX_ANONYMOUS_MB:g} MB)")
        print(f"  error   {report.error:7.4f} relative, {len(report.tensors)} tensors")
        print(
            f"  {COMPARED}: dense SVD {one['dense_s']:.2f} s, ours {one['ours_s']:.3f} s "
            f"({one['dense_s'] / one['ours_s']:.0f} x), errors {one['dense_error']:.6f} and "
            f"{one['ours_error']:.6f}"
        )
        print("  targets met" if met else "  TARGETS MISSED")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
