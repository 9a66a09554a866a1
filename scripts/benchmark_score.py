"""Examples scored under several adapters: hot-applied by ours, reloaded by llama-cpp-python.

    python scripts/benchmark_score.py [DATASET.jsonl] [--adapters 8] [--examples 16] [--threads 1]

Ours opens the base once and applies one adapter of --bank after the other; llama-cpp-python loads
the base with each (`lora_path`) and scores by create_completion(echo=True, logprobs=1). They take
turns adapter by adapter, on the same file, tokens and number of threads. First, on an F32 copy of
the base, both have to give the same log-likelihoods. Medians of --rounds, of which each takes
llama-cpp-python about 20 minutes on one core: it sorts the vocabulary for each echoed token.
Appends a line to results/score.jsonl; `make bench-report` writes the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from adapter_benchmark.scoring import Options, measure_scoring, read_texts
from adapter_benchmark.scoring_report import RESULTS
from result_lines import append_line
from serve_benchmark.facts import BANK, ROOT, SMALL, machine, say

from edgelora.bases import resolve
from edgelora.datasets.read import read_dataset


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = ROOT / "examples" / "returns" / "heldout.jsonl"
    parser.add_argument("dataset", type=Path, nargs="?", default=data)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--name", default=SMALL, help="of the base, in the table")
    parser.add_argument("--bank", type=Path, default=BANK, help="a folder of GGUF adapters")
    parser.add_argument("--adapters", type=int, default=8, help="the first of the bank, by name")
    parser.add_argument("--examples", type=int, default=16, help="the first of the dataset")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ctx", type=int, default=1024, help="tokens of a context")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    base = resolve(options.base)
    adapters = sorted(options.bank.glob("*.gguf"))[: options.adapters]
    texts = read_texts(base, read_dataset(options.dataset, limit=options.examples).examples)
    how = Options(options.threads, options.ctx, options.rounds, say)
    row = {"part": "score", "model": options.name, **machine(), "n_threads": options.threads}
    row |= {"dataset": "/".join(options.dataset.parts[-2:]), "n_ctx": options.ctx}
    row |= measure_scoring(base, adapters, texts, how)
    print(json.dumps(row), flush=True)
    append_line(options.results, row)


if __name__ == "__main__":
    main()
