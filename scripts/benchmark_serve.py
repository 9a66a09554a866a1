"""`edgelora serve` beside llama.cpp's own tools and servers: same files, threads and prompts.

    python scripts/benchmark_serve.py --quick            # small counts: does everything run?
    python scripts/benchmark_serve.py --only parallel single --rounds 5

Starts each server itself; they are built by `make peers`. Models are made in --folder if they are
not there (scripts/make_shape.py; coldstart needs 4 GB). Prints every number with its bound, appends
one line for each part and model to --out, from which `make bench-report` writes
docs/performance.md. Nothing else should run meanwhile: seconds depend on the machine, ratios less.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil
from build_peers import find_peers, is_built
from result_lines import append_line
from serve_benchmark.facts import SHAPE, Row, Run, about, say, shaped_model, small_model

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("isolation", "parallel", "single", "prefix", "coldstart")


def main() -> int:
    """Run the parts that were asked for; 1 where a bound is missed."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended too
    peers = find_peers()
    if not is_built(peers):
        sys.exit("the programs to compare with are not built: make peers")
    options.folder.mkdir(parents=True, exist_ok=True)
    rounds = options.rounds or (1 if options.quick else 5)
    models = (small_model(options.folder), shaped_model(options.folder, options.shape))
    all_models = Run(peers, models, options.folder, options.threads, rounds, options.quick)
    chosen = replace(all_models, models=tuple(m for m in models if options.model in m.name))
    met = True
    for part in options.only:
        run = chosen if part in ("parallel", "single", "prefix") else all_models
        say(f"{part} ({rounds} rounds, load {os.getloadavg()[0]:.2f})")
        for row in importlib.import_module(f"serve_benchmark.{part}").run(run):
            row = row | about(run)
            _show(row)
            if options.out:
                append_line(options.out, row)
            met &= all(bound["met"] for bound in row["targets"])
    return 0 if met else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "shapes")
    parser.add_argument("--shape", default=SHAPE, help="of the larger model (make_shape.py)")
    parser.add_argument("--model", default="", help="a part of one's name, where a part has two")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--rounds", type=int, default=0, help="default: 5, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="small counts, nothing is kept")
    parser.add_argument("--out", type=Path, help="default: results/serve.jsonl, unless --quick")
    options = parser.parse_args()
    if options.out is None and not options.quick:
        options.out = ROOT / "results" / "serve.jsonl"
    return options


def _show(row: Row) -> None:
    """Every number that has a bound, and the rest of the row for the curious."""
    print(f"{row['part']}, {row['model']}:")
    for system in row.get("systems", []):
        named = {key: value for key, value in system.items() if isinstance(value, dict)}
        numbers = "  ".join(f"{key} {value['median']:.4g}" for key, value in named.items())
        adapter = f" + {system['adapter']}" if system.get("adapter") else ""
        print(f"  {system['system']}{adapter}: {numbers}")
    plain = {key: value for key, value in row.items() if key in _PLAIN}
    if plain:
        print("  " + ", ".join(f"{key} {value}" for key, value in plain.items()))
    for bound in row["targets"]:
        words = [f"at least {bound['least']}"] * (bound["least"] is not None)
        words += [f"at most {bound['most']}"] * (bound["most"] is not None)
        verdict = ("met" if bound["met"] else "MISSED") if words else ""
        print(f"  {bound['name']}: {bound['value']:.3f} {' '.join(words)} {verdict}".rstrip())


_PLAIN = (
    "cost_ms", "python_us", "n_requests", "equal", "other_text", "ties", "largest_lead", "worst",
    "median", "sets_apart",
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
