"""Time and memory of a gradient pass, beside llama.cpp's prompt and torch on the same tokens.

    python scripts/benchmark_gradient.py FOLDER [--base smollm2-135m-instruct]
    python scripts/benchmark_gradient.py FOLDER --shape mistral-7b [--layers 2] [--own 47]

Models and adapters that are missing are made in FOLDER. Every arm runs in a process of its own,
whose peak RssAnon is measured from outside; the best of --repeat runs counts. What a run reads from
the disk is told too: 0 where the page cache has the file, more in a memory cgroup that cannot hold
it. The examples are random tokens, --prefix of which they share: "unshared" are examples that
differ in the first one.
llama.cpp scores the same examples (the head on completions only, weights repacked unless
--low-ram); with --llama-type q8_0 it does so with a requantised copy of the base. --torch PYTHON
adds the same step in transformers and PEFT, by a Python that has them (for SmolLM2 only).
A shortened model (--layers) has a larger share of head than the whole one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Before numpy: the package sets what OpenBLAS reads when numpy is imported.
from edgelora.adapters.base import Base, read_base

# isort: split
import numpy as np
import psutil
from make_shape import SHAPES, write_base, write_planned_lora
from measure_memory import watch

from edgelora.adapters.gguf_lora import PairPlan, check, open_lora
from edgelora.bases import resolve
from edgelora.engine.products import Products
from edgelora.engine.score import TokenisedExample, mean_loss
from edgelora.gradient import weights
from edgelora.gradient.decoder import Decoder, PassOptions, open_decoder
from edgelora.gradient.observers import CoefficientGradients

ADAPTED = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
PARTS = ("sgemm_s", "ggml_s", "dequantize_s")  # what a pass is parted into; the rest is ours
N_FILES = 4  # of the bank; more adapters than files are the same files again


def main() -> None:
    """Run the arms that were asked for and print a table."""
    options = parse()
    if options.arm:
        print(json.dumps(ARMS[options.arm](options)))
        return
    prepare(options)
    rows = {}
    for arm, shared in arms_of(options):
        name = f"{arm}, {'shared' if shared else 'unshared'}"
        print(name, file=sys.stderr, flush=True)
        rows[name] = run_arm(arm, shared, options)
    print(report(rows, options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--shape", choices=SHAPES, help="a base of random weights instead")
    parser.add_argument("--type", default="q4_0", help="of its weights, e.g. q4_k_m")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than it has")
    parser.add_argument("--llama-type", help="llama.cpp gets a copy of this type, e.g. q8_0")
    parser.add_argument("--low-ram", action="store_true", help="llama.cpp does not repack")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=51, help="tokens that all examples share")
    parser.add_argument("--own", type=int, default=31, help="tokens of each example after that")
    parser.add_argument("--completion", type=int, default=3, help="of these, the completion")
    parser.add_argument("--adapters", type=int, default=0, help="size of the bank that is ranked")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scratch", type=Path, help="a folder on a disk for the blocks' inputs")
    parser.add_argument("--keep", type=int, default=0, help="MiB for activations, as PassOptions")
    parser.add_argument("--exact", action="store_true", help="no kernels of ggml that round rows")
    parser.add_argument("--repeat", type=int, default=1)
    plain = ("llama", "forward", "gradient")
    parser.add_argument("--arms", nargs="+", choices=plain, default=plain, help="only these")
    parser.add_argument("--shared-only", action="store_true", help="leave the unshared arms out")
    parser.add_argument("--torch", type=Path, metavar="PYTHON")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layers and not options.shape:
        parser.error("--layers shortens a base of random weights: it needs --shape")
    return options


def arms_of(options: argparse.Namespace) -> list[tuple[str, bool]]:
    """Which arms are run, with shared prefixes or without."""
    arms = [(arm, shared) for arm in options.arms for shared in (True, False)]
    arms = [(arm, shared) for arm, shared in arms if shared or not options.shared_only]
    bank = [("bank", True)] if options.adapters else []
    return arms + bank + ([("torch", False)] if options.torch else [])


def base_of(options: argparse.Namespace) -> Path:
    """The base that is derived."""
    if not options.shape:
        return resolve(options.base)
    layers = f"-{options.layers}" if options.layers else ""
    return Path(options.folder) / f"{options.shape}-{options.type}{layers}.gguf"


def prepare(options: argparse.Namespace) -> None:
    """Write what is missing in the folder."""
    from edgelora.engine.quantize import quantize

    options.folder.mkdir(parents=True, exist_ok=True)
    base = base_of(options)
    if options.shape and not base.exists():
        shape = SHAPES[options.shape]
        shape = replace(shape, n_layer=options.layers or shape.n_layer)
        if "_k" in options.type:  # which llama.cpp alone can write
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                plain = Path(scratch) / base.name
                write_base(plain, shape, dtype="q8_0")
                quantize(plain, base, options.type)
        else:
            write_base(base, shape, dtype=options.type)
    copy = llama_base(options)
    if not copy.exists():
        quantize(base, copy, options.llama_type)
    if options.adapters:
        write_bank_for(read_base(base), bank_of(options), options.rank)


def write_bank_for(base: Base, paths: Sequence[Path], rank: int) -> None:
    """Adapters of the base's own q, k and v where they are missing.

    What lies there but is not of this base ends the run: a pass would fail on it halfway.
    """
    plan = [
        PairPlan(name, rank, shape[1], shape[0])
        for name, shape in base.shapes.items()
        if name.startswith("blk.") and name.split(".", 2)[2] in ADAPTED
    ]
    if not plan:
        sys.exit(f"{base.path}: none of its tensors is {', '.join(ADAPTED)}; leave --adapters out")
    for number, path in enumerate(paths):
        if not path.exists():
            write_planned_lora(path, plan, architecture=base.architecture, seed=number)
        elif problems := check(open_lora(path), base):
            sys.exit(f"{path}: not an adapter of {base.path} ({problems[0]}); delete it")


def llama_base(options: argparse.Namespace) -> Path:
    """The base that llama.cpp runs."""
    base = base_of(options)
    return options.folder / f"{base.stem}-{options.llama_type}.gguf" if options.llama_type else base


def bank_of(options: argparse.Namespace) -> list[Path]:
    """The adapters' files."""
    name = f"{base_of(options).stem}-r{options.rank}"
    return [Path(options.folder) / f"{name}-{i}.gguf" for i in range(N_FILES)]


def examples_of(options: argparse.Namespace, n_vocab: int) -> list[TokenisedExample]:
    """Random tokens; unshared examples differ in their first."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(300, n_vocab, options.prefix).tolist()
    made = []
    for line in range(options.examples):
        start = prefix if options.shared else [300 + line, *prefix[1:]]
        own = rng.integers(300, n_vocab, options.own + 1).tolist()  # the last gets no row
        cut = len(own) - options.completion
        made.append(TokenisedExample((*start, *own[:cut]), tuple(own[cut:]), line))
    return made


def run_arm(arm: str, shared: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One arm in a process of its own: what it printed, and its peak RssAnon."""
    python = str(options.torch) if arm == "torch" else sys.executable
    command = [python, *sys.argv, "--arm", arm, *(["--shared"] if shared else [])]
    # Files, not pipes: nobody reads while the child is watched.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = psutil.Popen(command, stdout=out, stderr=errors)
        peak = watch(child, interval_s=0.02)
        texts = [file.seek(0) or file.read().decode(errors="replace") for file in (out, errors)]
    if child.returncode:
        sys.exit(f"{arm} failed:\n{texts[1]}")
    answer: dict[str, Any] = json.loads(texts[0].splitlines()[-1])
    return answer | {"peak_mb": peak / 1e6}


def best(function: Callable[[], float], repeat: int) -> dict[str, Any]:
    """The shortest of some runs, what the function returned, and what a run read from the disk."""
    times, loss = [], 0.0
    read_before = read_bytes()
    for _ in range(repeat):
        started = time.perf_counter()
        loss = function()
        times.append(time.perf_counter() - started)
    read_mb = (read_bytes() - read_before) / repeat / 1e6
    return {"seconds": min(times), "loss": loss, "read_mb": read_mb}


def read_bytes() -> int:
    """From the disk by this process, its mapped files included; 0 where no system tells."""
    process = psutil.Process()
    return int(process.io_counters().read_bytes) if hasattr(process, "io_counters") else 0


def run_llama(options: argparse.Namespace) -> dict[str, Any]:
    from edgelora.engine.context import open_context
    from edgelora.engine.model import ModelOptions, open_model
    from edgelora.engine.score import count_tokens, score

    base = llama_base(options)
    with (
        open_model(base, ModelOptions(low_ram=options.low_ram)) as model,
        open_context(model) as context,
    ):
        texts = examples_of(options, model.vocabulary.n_tokens)
        result = best(lambda: mean_loss(score(context, texts)), options.repeat)
        return result | {"rows": count_tokens(texts)}


def run_forward(options: argparse.Namespace) -> dict[str, Any]:
    decoder, texts, how = opened(options)
    return measured(decoder, lambda: mean_loss(decoder.losses(texts, {}, how)), options, texts)


def run_gradient(options: argparse.Namespace) -> dict[str, Any]:
    decoder, texts, how = opened(options)

    def once() -> float:
        return mean_loss(decoder.gradients(texts, {}, lambda name, x, g: None, how))

    return measured(decoder, once, options, texts)


def run_bank(options: argparse.Namespace) -> dict[str, Any]:
    """A pass that ranks a bank; its files are read once before, so that the disk is warm.

    `ranking_s` is the least that ranking took of a pass: the difference of two passes is
    mostly noise.
    """
    decoder, texts, how = opened(options)
    files = [open_lora(path) for path in bank_of(options)]
    for file in files:
        file.path.read_bytes()
    bank = [files[i % len(files)] for i in range(options.adapters)]
    ranking_s: list[float] = []

    def once() -> float:
        found = CoefficientGradients(bank)
        ranking_s.append(0.0)

        def rank(name: str, x: weights.Array, g: weights.Array) -> None:
            started = time.perf_counter()
            found(name, x, g)
            ranking_s[-1] += time.perf_counter() - started

        return mean_loss(decoder.gradients(texts, {}, rank, how))

    return measured(decoder, once, options, texts) | {"ranking_s": min(ranking_s)}


def opened(
    options: argparse.Namespace,
) -> tuple[Decoder, list[TokenisedExample], PassOptions]:
    n_threads = psutil.cpu_count(logical=False) or 1
    decoder = open_decoder(base_of(options), n_threads=n_threads, exact=options.exact)
    texts = examples_of(options, decoder.model.n_vocab)
    keep_bytes = options.keep << 20
    return decoder, texts, PassOptions(2048, scratch=options.scratch, keep_bytes=keep_bytes)


def measured(
    decoder: Decoder,
    once: Callable[[], float],
    options: argparse.Namespace,
    texts: list[TokenisedExample],
) -> dict[str, Any]:
    """Time, and where it went in one run more: matrix products, dequantising, the rest."""
    result = best(once, options.repeat)
    rows = decoder.count_rows(texts, PassOptions(max_tokens=2048))
    spent: dict[str, float] = dict.fromkeys((*PARTS, "flop"), 0.0)
    started = time.perf_counter()
    with instrumented(spent):
        once()
    spent["whole_s"] = time.perf_counter() - started
    return result | spent | {"rows": rows, "alone": rate_alone(decoder, rows)}


@contextlib.contextmanager
def instrumented(spent: dict[str, float]) -> Iterator[None]:
    """Count the time of the products with the base's matrices and of dequantising."""
    matmul, in_float, times = np.matmul, weights.Weights._in_float, Products.times

    def timed_matmul(a: Any, b: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        result = matmul(a, b, **keywords)
        spent["sgemm_s"] += time.perf_counter() - started
        spent["flop"] += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        return result

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **keywords)
            spent[part] += time.perf_counter() - started
            return result

        return run

    with (
        patch.object(np, "matmul", timed_matmul),
        patch.object(weights.Weights, "_in_float", timed(in_float, "dequantize_s")),
        patch.object(Products, "times", timed(times, "ggml_s")),
    ):
        yield


def rate_alone(decoder: Decoder, rows: int) -> float:
    """GFLOP/s of sgemm by itself on the products of one block, on tiles as a pass has them."""
    times, flop = 0.0, 0.0
    for name, info in decoder.weights.gguf.tensors.items():
        if not name.startswith("blk.0.") or len(info.shape) != 2:
            continue
        n_out, n_in = info.shape
        tile = np.ones((min(n_out, max(1, weights.TILE_WEIGHTS // n_in)), n_in), np.float32)
        x, y = np.ones((rows, n_in), np.float32), np.empty((rows, len(tile)), np.float32)
        runs = []
        for _ in range(4):
            started = time.perf_counter()
            np.matmul(x, tile.T, out=y)
            runs.append(time.perf_counter() - started)
        times += statistics.median(runs)
        flop += 2.0 * rows * tile.size
    return flop / times / 1e9


def run_torch(options: argparse.Namespace) -> dict[str, Any]:
    """The same step: loss and gradients of one LoRA on q, k, v, in float32, without sharing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = base_of(options)
    plain = AutoModelForCausalLM.from_pretrained(
        base.parent, gguf_file=base.name, dtype=torch.float32
    )
    targets = ["q_proj", "k_proj", "v_proj"]
    model = get_peft_model(plain, LoraConfig(r=options.rank, target_modules=targets))
    texts = examples_of(options, plain.config.vocab_size)
    ids = torch.tensor([text.prompt + text.completion for text in texts])
    n = options.completion

    def once() -> float:
        model.zero_grad()
        logits = model(ids[:, :-1], logits_to_keep=n).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), ids[:, -n:].reshape(-1)
        )
        loss.backward()
        return float(loss)

    return best(once, options.repeat) | {"rows": ids[:, :-1].numel()}


def report(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """A Markdown table, and `_comparisons`."""
    lines = [
        f"{base_of(options).name}; llama.cpp with {llama_base(options).name}"
        f"{', not repacked' if options.low_ram else ', repacked where it can be'};"
        f" {psutil.cpu_count(logical=False)} cores",
        "",
        "| arm | rows | s | / llama.cpp | sgemm | ggml's products | dequantising |"
        " GFLOP/s of sgemm (alone) | MB | read MB | loss |",
        "|---|" + "---:|" * 10,
    ]
    for name, row in rows.items():
        sharing = name.partition(", ")[2]
        llama = rows.get(f"llama, {sharing}")
        times = f"{row['seconds'] / llama['seconds']:.2f}" if llama else ""
        parts = ["", "", "", ""]
        if "whole_s" in row:
            rate = row["flop"] / max(row["sgemm_s"], 1e-9) / 1e9
            parts = [f"{row[part] / row['whole_s']:.0%}" for part in PARTS]
            parts.append(f"{rate:.0f} ({row['alone']:.0f})" if row["flop"] else "")
        cells = [name, str(row["rows"]), f"{row['seconds']:.2f}", times, *parts]
        cells += [f"{row['peak_mb']:.0f}", f"{row['read_mb']:.0f}", f"{row['loss']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_comparisons(rows, options)])


def _comparisons(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> Iterator[str]:
    """What the arms say of each other, where those that it takes were run."""
    seconds = {name: row["seconds"] for name, row in rows.items()}
    if seconds.keys() >= {"gradient, unshared", "gradient, shared"}:
        gain = seconds["gradient, unshared"] / seconds["gradient, shared"]
        yield f"- Sharing the prefix makes a pass {gain:.2f} times faster."
    if seconds.keys() >= {"bank, shared", "forward, shared"}:
        ranking = rows["bank, shared"]["ranking_s"]
        yield (
            f"- Ranking {options.adapters} adapters of rank {options.rank} costs "
            f"{ranking / seconds['forward, shared']:.2f} of a forward."
        )
    if seconds.keys() >= {"torch, unshared", "gradient, shared"}:
        faster = seconds["torch, unshared"] / seconds["gradient, shared"]
        less = rows["torch, unshared"]["peak_mb"] / rows["gradient, shared"]["peak_mb"]
        yield f"- torch takes {faster:.2f} times as long and {less:.1f} times the memory."


ARMS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "llama": run_llama,
    "forward": run_forward,
    "gradient": run_gradient,
    "bank": run_bank,
    "torch": run_torch,
}


if __name__ == "__main__":
    main()
