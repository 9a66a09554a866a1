"""Conversion of adapters of Mistral-7B's size in one process, with llama.cpp's converter beside it.

    python scripts/benchmark_convert.py [--adapters 20]
    python scripts/benchmark_convert.py --llama-cpp SOURCE_OF_LLAMA_CPP --reference-python PYTHON

Makes adapters (q, k, v of 32 layers, rank 16, F32, 37.8 MB) and a base of the same shapes whose
weights are a hole in a sparse file, since conversion reads the header only. llama.cpp's source
comes from scripts/fetch_llama_cpp_source.py; its converter needs torch and transformers in its
Python (`make setup-parity`) and takes a process for each adapter. Seconds depend on the machine;
the ratios say more. Appends a line to results/adapters.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from adapter_benchmark.results import RESULTS, add
from make_shape import SHAPES, Shape, write_base, write_peft
from measure_memory import watch

from edgelora.adapters.base import read_base
from edgelora.adapters.peft import convert
from edgelora.gguf_file import open_gguf

MEASURED = """
import sys
from pathlib import Path
from edgelora.adapters.base import read_base
from edgelora.adapters.peft import convert
convert(Path(sys.argv[1]), read_base(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def main() -> None:
    """Make the input, measure, print, append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's source, to run its converter")
    parser.add_argument("--reference-python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--reference-runs", type=int, default=3, help="of the other converter")
    parser.add_argument("--workspace", type=Path, help="where to write 1.2 GB (default: temporary)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory(dir=options.workspace) as folder:
        root = Path(folder)
        base = write_base(root / "base.gguf", shape, sparse=True)
        sources = [write_peft(root / f"peft-{i}", shape, seed=i) for i in range(options.adapters)]
        row = {"part": "convert", "shape": options.shape, "adapters": options.adapters}
        row |= measure(sources, base, root)
        if options.llama_cpp:
            runs = sources[: options.reference_runs]
            row |= compare(options.llama_cpp, options.reference_python, shape, runs, root)
            row["ratio"] = row["reference_s"] / row["seconds_each"]
    add(options.results, row)


def measure(sources: list[Path], base: Path, root: Path) -> dict[str, Any]:
    """Seconds for each in this process, and as a process of its own, with its memory."""
    seconds = []
    for source in sources:
        start = time.perf_counter()
        convert(source, read_base(base), root / f"{source.name}.gguf")
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, sources[0], base, root / "alone.gguf"]
    peak = peak_memory(command)
    return {
        "seconds_each": statistics.mean(seconds),
        "seconds_median": statistics.median(seconds),
        "seconds_process": time.perf_counter() - start,
        "anonymous_mb": peak / 1e6,
    }


def compare(
    llama_cpp: Path, python: str, shape: Shape, sources: list[Path], root: Path
) -> dict[str, Any]:
    """convert_lora_to_gguf.py on the same adapters: seconds, memory, whether the bits agree."""
    (root / "config.json").write_text(json.dumps(hf_config(shape)), encoding="utf-8")
    script = llama_cpp / "convert_lora_to_gguf.py"
    seconds, peaks, equal = [], [], True
    for source in sources:
        theirs = root / f"theirs-{source.name}.gguf"
        command = [python, script, source, "--base", root, "--outfile", theirs, "--outtype", "f16"]
        start = time.perf_counter()
        peaks.append(peak_memory(command, quiet=True))
        seconds.append(time.perf_counter() - start)
        equal = equal and same_bits(root / f"{source.name}.gguf", theirs)
    return {
        "reference_s": statistics.median(seconds),
        "reference_mb": max(peaks) / 1e6,
        "same_tensors": equal,
    }


def hf_config(shape: Shape) -> dict[str, object]:
    """What the reference reads of a base."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "max_position_embeddings": shape.n_ctx,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": shape.n_vocab,
        "tie_word_embeddings": shape.tied,
    }


def peak_memory(command: list[object], *, quiet: bool = False) -> int:
    """The highest anonymous memory of a child in bytes."""
    output = subprocess.DEVNULL if quiet else None
    child = psutil.Popen([str(part) for part in command], stderr=output)
    peak = watch(child, interval_s=0.001)
    if child.returncode:
        raise SystemExit(f"the measured process failed: {command}")
    return peak


def same_bits(ours: Path, theirs: Path) -> bool:
    """Whether two GGUFs hold the same tensors with the same bytes."""
    mine, other = open_gguf(ours), open_gguf(theirs)
    return mine.tensors.keys() == other.tensors.keys() and all(
        mine.raw(name).tobytes() == other.raw(name).tobytes() for name in mine.tensors
    )


if __name__ == "__main__":
    main()
