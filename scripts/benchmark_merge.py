"""A merge at Mistral-7B size (q, k, v) on one core, beside PEFT's svd and the paper's product.

    python scripts/benchmark_merge.py FOLDER [--adapters 8] [--rank 16] [--to 16]
    python scripts/benchmark_merge.py FOLDER --reference-python .venv-parity/bin/python

The adapters are made in FOLDER first, if they are not there. PEFT's svd runs in a Python that has
it, on one layer; its time is multiplied by the number of layers. The paper (arXiv:2507.01806)
multiplies coefficients with one matrix of all flattened adapters, which averages the factors, so
`linear` does the same here. Memory is RssAnon of /proc, sampled every 5 ms; where there is no
/proc, the resident size. Appends a line to results/adapters.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from adapter_benchmark.results import RESULTS, add
from make_shape import SHAPES, write_gguf_lora
from measure_memory import anonymous

from edgelora.adapters.gguf_lora import LoraFile, open_lora
from edgelora.adapters.merge import merge_adapters, one_blas_thread

LAYER = "blk.0."
PEFT_SVD = """
import json, sys, time
import numpy as np, peft, torch
torch.set_num_threads(1)
given = np.load(sys.argv[1])
names = sorted({name.split("/")[1] for name in given.files})
n = len({name.split("/")[0] for name in given.files})
rank, weights = int(sys.argv[2]), [1 / n] * n
shapes = {m: (given[f"0/{m}/b"].shape[0], given[f"0/{m}/a"].shape[1]) for m in names}
layer = torch.nn.ModuleDict(
    {m: torch.nn.Linear(i, o, bias=False, device="meta") for m, (o, i) in shapes.items()}
).to_empty(device="cpu")
source = given[f"0/{names[0]}/a"].shape[0]
config = peft.LoraConfig(r=source, lora_alpha=2 * source, target_modules=names)
model = peft.PeftModel(layer, config, adapter_name="0")
for i in range(1, n):
    model.add_adapter(str(i), config)
modules = {m: model.base_model.model[m] for m in names}
with torch.no_grad():
    for i in range(n):
        for m, module in modules.items():
            module.lora_A[str(i)].weight.copy_(torch.from_numpy(given[f"{i}/{m}/a"]))
            module.lora_B[str(i)].weight.copy_(torch.from_numpy(given[f"{i}/{m}/b"]))
started = time.perf_counter()
model.add_weighted_adapter([str(i) for i in range(n)], weights, "mixed", "svd", svd_rank=rank)
seconds = time.perf_counter() - started
lost = total = 0.0
for m, module in modules.items():
    exact = sum(w * module.get_delta_weight(str(i)) for i, w in enumerate(weights))
    lost += float((module.get_delta_weight("mixed") - exact).double().square().sum())
    total += float(exact.double().square().sum())
print(json.dumps({"seconds": seconds, "error": (lost / total) ** 0.5, "peft": peft.__version__}))
"""


@contextmanager
def watched_memory() -> Iterator[list[float]]:
    """A list whose first entry is the peak in MB once the block has ended."""
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
        peak[0] = max(peak[0], anonymous(process) / 1e6)


def merged(paths: Sequence[Path], out: Path, **options: Any) -> dict[str, Any]:
    """Our merge of the uniform mean, and what it took."""
    before = anonymous(psutil.Process()) / 1e6
    started, used = time.perf_counter(), time.process_time()
    with watched_memory() as peak:
        report = merge_adapters(paths, [1 / len(paths)] * len(paths), out, force=True, **options)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "anonymous_mb": peak[0],
        "added_mb": peak[0] - before,
        "error": report.error,
        "excess": report.excess,
        "tensors": len(report.tensors),
    }


def papers_product(paths: Sequence[Path]) -> dict[str, float]:
    """Every adapter flattened into one row of one float32 matrix, times the coefficients."""
    before = anonymous(psutil.Process()) / 1e6
    started = time.perf_counter()
    with watched_memory() as peak:
        files = [open_lora(path) for path in paths]
        matrix = np.stack([_flat(file) for file in files])
        product = np.full(len(paths), 1 / len(paths), np.float32) @ matrix
    seconds = time.perf_counter() - started
    assert product.shape == matrix.shape[1:]
    return {"seconds": seconds, "anonymous_mb": peak[0], "added_mb": peak[0] - before}


def _flat(file: LoraFile) -> np.ndarray:
    arrays = (array for pair in file.pairs() for array in (pair.lora_a, pair.lora_b))
    return np.concatenate([np.asarray(array, np.float32).ravel() for array in arrays])


def pefts_svd(python: str, paths: Sequence[Path], rank: int, n_layer: int) -> dict[str, Any]:
    """PEFT's svd of one layer in another process, scaled to all, and our error on that layer."""
    files = [open_lora(path) for path in paths]
    names = [name for name in files[0].names if name.startswith(LAYER)]
    arrays = {}
    for i, file in enumerate(files):
        for name in names:
            pair, module = file.pair(name), name.split(".")[2]
            arrays[f"{i}/{module}/a"] = np.asarray(pair.lora_a, np.float32)
            arrays[f"{i}/{module}/b"] = np.asarray(pair.lora_b, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "layer.npz"
        np.savez(given, **arrays)
        command = [python, "-c", PEFT_SVD, str(given), str(rank)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows = {n: [1 / len(files) * n.startswith(LAYER)] * len(files) for n in files[0].names}
        ours = merge_adapters(files, rows, Path(folder) / "layer.gguf", rank=rank, dtype="f32")
    told = json.loads(done.stdout)
    return told | {"seconds": told["seconds"] * n_layer, "layers": 1, "our_error": ours.error}


def main() -> None:
    """Make what is missing, measure, print, append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16, help="of the sources")
    parser.add_argument("--to", type=int, default=16, help="rank of the result")
    parser.add_argument("--reference-python", help="a Python with torch and PEFT")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    shape, paths = SHAPES[options.shape], []
    for i in range(options.adapters):
        paths.append(options.folder / f"{options.shape}-r{options.rank}-{i}.gguf")
        if not paths[-1].exists():
            write_gguf_lora(paths[-1], shape, rank=options.rank, alpha=2 * options.rank, seed=i)
    out = options.folder / "merged.gguf"
    row: dict[str, Any] = {"part": "merge", "shape": options.shape, "adapters": options.adapters}
    row |= {"rank": options.rank, "to": options.to}
    with one_blas_thread():
        row |= merged(paths, out, rank=options.to)
        row["linear"] = merged(paths, out, method="linear")
        row["dense"] = papers_product(paths)
        if options.reference_python:
            row["peft"] = pefts_svd(options.reference_python, paths, options.to, shape.n_layer)
    add(options.results, row)


if __name__ == "__main__":
    main()
