"""What each stage costs as a bank grows: a real bank of a real shape, then simulated ones.

    python scripts/make_shape.py mistral-7b FOLDER --bank 500
    python scripts/benchmark_scale.py bank FOLDER --merge 32 500
    python scripts/benchmark_scale.py simulate SCRATCH --counts 1000 10000 100000 1000000
    python scripts/benchmark_scale.py picture docs/scale.svg

The first two append lines to results/scale.jsonl; `make bench-report` writes the tables of
docs/scale.md from there. `simulate` lists files without content through a real index, and measures
distances on memory-mapped float16 means as wide as Mistral's: 8.2 GB for a million. Seconds are of
one BLAS thread, inside the process, after imports; memory is RssAnon.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from adapter_benchmark.results import add
from adapter_benchmark.scale import RESULTS, read_rows
from benchmark_merge import watched_memory
from make_shape import SHAPES, draw_signature
from numpy.typing import NDArray
from result_lines import Row
from result_lines.svg import save_svg

from edgelora.adapters.base import read_base
from edgelora.adapters.merge import merge_adapters, one_blas_thread
from edgelora.bank import open_bank
from edgelora.bank.index import list_adapters, store_records
from edgelora.bank.records import BankRecord
from edgelora.build.grams import open_mixture
from edgelora.build.pool import open_pool
from edgelora.operators.distances import prepare
from edgelora.operators.heads import attentional

BLOCK = 1024
Array = NDArray[np.float64]


def main() -> None:
    """One part, as the command line asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("bank", "simulate", "picture"))
    parser.add_argument("where", type=Path, help="FOLDER, SCRATCH or the picture")
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--merge", type=int, nargs="*", default=[32], help="adapters in a merge")
    parser.add_argument("--rank", type=int, default=16, help="of the merged adapter")
    parser.add_argument("--counts", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.part == "picture":
        draw(read_rows(options.results), options.where)
        return
    with one_blas_thread(), tempfile.TemporaryDirectory() as cache:
        os.environ["EDGELORA_CACHE"] = cache  # what an earlier run kept would be no measurement
        if options.part == "bank":
            rows = measure_bank(options.where, options.shape, options.merge, options.rank)
        else:
            rows = simulate(options.where, options.shape, options.counts)
        for row in rows:
            add(options.results, row)


def measure_bank(folder: Path, shape: str, merges: Sequence[int], rank: int) -> Iterator[Row]:
    """A row for each stage over the bank that make_shape.py wrote."""
    bank = open_bank(folder / "bank")
    identity = read_base(folder / f"{shape}-header.gguf").identity
    bank.listing()  # makes the index, where it is not there
    k = len(bank.records())

    def row(stage: str, spent: Spent, **more: object) -> Row:
        return {"part": "bank", "shape": shape, "k": k, "stage": stage, **vars(spent), **more}

    with spent() as listing:
        bank.listing()
    yield row("ls", listing)
    with spent() as opening:
        pool = open_pool(bank, identity, ())
    yield row("signatures read", opening)
    target = draw_signature(SHAPES[shape], identity.id, seed=10**6)
    for name, make, use in (
        ("distances", lambda: prepare("bures", pool.others), lambda made: made(target)),
        ("mixture", lambda: open_mixture(pool.others), lambda made: made.match(target)),
    ):
        with spent() as preparing:
            made = make()
        yield row(f"{name}, the bank's part", preparing)
        if name == "mixture":
            with spent() as preparing:
                open_mixture(pool.others)
            yield row("mixture, the bank's part from the cache", preparing)
        with spent() as using:
            use(made)
        yield row(name, using)
    for n in merges:
        paths = pool.paths[:n]
        with spent() as merging:
            report = merge_adapters(
                paths, [1 / n] * len(paths), folder / "merged.gguf", rank=rank, force=True
            )
        yield row("merge", merging, n=len(paths), error=report.error, excess=report.excess)


def simulate(scratch: Path, shape: str, counts: Sequence[int]) -> Iterator[Row]:
    """Rows of listing, distances and coefficients over banks that exist as numbers only."""
    scratch.mkdir(parents=True, exist_ok=True)
    d = SHAPES[shape].n_embd
    for k in counts:
        facts = {"part": "simulated", "shape": shape, "k": k}
        with _indexed(scratch, k) as (files, index):
            with spent() as listing:
                found = list_adapters(files, index)
        assert len(found.records) == k and not found.warnings
        yield facts | {"stage": "ls", **vars(listing)}
        with _drawn_means(scratch / "means.f16", k, d) as means:
            target = np.random.default_rng(0).standard_normal(d, dtype=np.float32)
            with spent() as scanning:
                squared = _squared_distances(means, target)
            size = means.nbytes
        yield facts | {"stage": "distances", "file_bytes": size, **vars(scanning)}
        with spent() as softening:
            attentional(np.sqrt(squared))
        yield facts | {"stage": "coefficients", **vars(softening)}


@dataclass
class Spent:
    """Seconds of the clock and of the CPU, and the peak of anonymous memory."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    anonymous_mb: float = 0.0


@contextmanager
def spent() -> Iterator[Spent]:
    """What the block takes, filled in at its end."""
    found = Spent()
    with watched_memory() as peak:
        clock, cpu = time.perf_counter(), time.process_time()
        yield found
        found.seconds = round(time.perf_counter() - clock, 4)
        found.cpu_seconds = round(time.process_time() - cpu, 4)
    found.anonymous_mb = round(peak[0], 1)


@contextmanager
def _indexed(scratch: Path, k: int) -> Iterator[tuple[Path, Path]]:
    """k empty files named as adapters, and an index that knows them all."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        files, index = Path(folder) / "adapters", Path(folder) / "index.sqlite"
        files.mkdir()
        records, stamps = {}, {}
        for i in range(k):
            path = files / f"random{i:07}.gguf"
            path.touch()
            stamp = path.stat()
            record = BankRecord(
                path.stem, path, 0, "b" * 16, "llama", "s" * 64, "t" * 64, "n" * 64, "chat", "", "",
                "", "", "", (16, 16), 96, "f16", "0" * 64, "0" * 64, "simulated",
            )  # fmt: skip
            records[path.name] = record
            stamps[path.name] = (stamp.st_size, stamp.st_mtime_ns)
        store_records(index, records, stamps, [])
        yield files, index


@contextmanager
def _drawn_means(path: Path, k: int, d: int) -> Iterator[NDArray[np.float16]]:
    """(k, d) float16 in a mapped file: one block of random values, rolled so that rows differ."""
    block = np.random.default_rng(1).standard_normal((BLOCK, d), dtype=np.float32)
    halves = block.astype(np.float16)
    with path.open("wb") as file:
        for at in range(0, k, BLOCK):
            file.write(np.roll(halves, at // BLOCK, axis=1)[: k - at].data)
    try:
        yield np.memmap(path, np.float16, "r", shape=(k, d))
    finally:
        path.unlink()


def _squared_distances(means: NDArray[np.float16], target: NDArray[np.float32]) -> Array:
    """(k,) float64: |mean - target|^2, a block of rows at a time."""
    blocks = (means[at : at + BLOCK].astype(np.float32) for at in range(0, len(means), BLOCK))
    return np.concatenate([((block - target) ** 2).sum(axis=1) for block in blocks]).astype(float)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Seconds of each simulated stage against the size of the bank, as an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "scale", "svg.fonttype": "none", "font.size": 10}
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    panel = figure.subplots()
    for stage in ("ls", "distances", "coefficients"):
        some = sorted(
            (row["k"], row["seconds"])
            for row in rows
            if row["part"] == "simulated" and row["stage"] == stage
        )
        panel.plot(*zip(*some, strict=True), marker="o", label=stage)
    panel.set(xscale="log", yscale="log", xlabel="adapters in the bank", ylabel="seconds")
    panel.legend()
    save_svg(figure, path)


if __name__ == "__main__":
    main()
