"""Time and memory of one conversion at Mistral-7B size, and llama.cpp's converter beside it.

    python scripts/benchmark_convert.py
    python scripts/benchmark_convert.py --llama-cpp SOURCE_OF_LLAMA_CPP --reference-python PYTHON

Makes an adapter (q, k, v of 32 layers, rank 16, F32, 37.8 MB) and a base of the same shapes whose
weights are a hole in a sparse file, since conversion reads the header only. The reference needs
torch and transformers in its Python. Seconds depend on the machine; the ratios say more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from gguf import GGMLQuantizationType, GGUFWriter
from measure_memory import watch
from numpy.typing import NDArray

from edgelora.adapters.base import read_base
from edgelora.adapters.peft import convert
from edgelora.adapters.safetensors_file import save_safetensors
from edgelora.gguf_file import open_gguf

N_LAYER, N_EMBD, N_KV, N_FF, N_VOCAB, RANK = 32, 4096, 1024, 14336, 32000, 16
BLOCK = {
    "attn_q": (N_EMBD, N_EMBD),
    "attn_k": (N_KV, N_EMBD),
    "attn_v": (N_KV, N_EMBD),
    "attn_output": (N_EMBD, N_EMBD),
    "ffn_gate": (N_FF, N_EMBD),
    "ffn_up": (N_FF, N_EMBD),
    "ffn_down": (N_EMBD, N_FF),
}
HF_CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": N_EMBD,
    "intermediate_size": N_FF,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": N_VOCAB,
    "tie_word_embeddings": False,
}
MEASURED = """
import sys
from pathlib import Path
from edgelora.adapters.base import read_base
from edgelora.adapters.peft import convert
convert(Path(sys.argv[1]), read_base(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def main() -> None:
    """Make the input, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's source, to run its converter")
    parser.add_argument("--reference-python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workspace", type=Path, help="where to write 100 MB (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.workspace) as folder:
        root = Path(folder)
        adapter, base = write_adapter(root / "adapter"), write_base(root / "base.gguf")
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
        seconds = time_conversion(adapter, base, root, options.repeats)
        peak = peak_memory([sys.executable, "-c", MEASURED, adapter, base, root / "m.gguf"])
        bare = peak_memory([sys.executable, "-c", "import time; time.sleep(0.3)"])
        print(f"edgelora, in process: median {statistics.median(seconds):.3f} s of {seconds}")
        print(f"edgelora, anonymous memory above a bare interpreter: {(peak - bare) / 1e6:.0f} MB")
        if options.llama_cpp:
            compare(options.llama_cpp, options.reference_python, adapter, base, root, seconds)


def write_adapter(folder: Path) -> Path:
    """A PEFT folder of Mistral-7B's shapes, random, F32."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.floating]] = {}
    for layer in range(N_LAYER):
        for module in ("q", "k", "v"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}_proj"
            n_out, n_in = BLOCK[f"attn_{module}"]
            arrays[f"{prefix}.lora_A.weight"] = rng.standard_normal((RANK, n_in), dtype=np.float32)
            arrays[f"{prefix}.lora_B.weight"] = rng.standard_normal((n_out, RANK), dtype=np.float32)
    save_safetensors(folder / "adapter_model.safetensors", arrays, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_base(path: Path) -> Path:
    """A Q4_0 GGUF of Mistral-7B's shapes whose weights were never written."""
    writer = GGUFWriter(None, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_embedding_length(N_EMBD)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token {i}" for i in range(N_VOCAB)])
    shapes = {"token_embd.weight": (N_VOCAB, N_EMBD), "output.weight": (N_VOCAB, N_EMBD)}
    for layer in range(N_LAYER):
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in BLOCK.items()}
    kind = GGMLQuantizationType.Q4_0
    for name, shape in shapes.items():
        size = shape[0] * shape[1] // 32 * 18
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    norms = [f"blk.{i}.{part}.weight" for i in range(N_LAYER) for part in ("attn_norm", "ffn_norm")]
    for name in [*norms, "output_norm.weight"]:
        writer.add_tensor_info(name, (N_EMBD,), np.dtype(np.float32), 4 * N_EMBD)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    total = sum(a * b // 32 * 18 for a, b in shapes.values()) + 4 * N_EMBD * (len(norms) + 1)
    os.truncate(path, path.stat().st_size + total + 64)
    return path


def time_conversion(adapter: Path, base: Path, root: Path, repeats: int) -> list[float]:
    """Seconds of each conversion, reading the base's header included; the first is not counted."""
    seconds = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        convert(adapter, read_base(base), root / "ours.gguf", dtype="f16")
        seconds.append(round(time.perf_counter() - start, 3))
        (root / "ours.gguf").rename(root / f"ours-{i}.gguf")
        (root / f"ours-{i - 1}.gguf").unlink(missing_ok=True)
    return seconds[1:]


def peak_memory(command: list[object], *, quiet: bool = False) -> int:
    """The highest anonymous memory of a child in bytes."""
    output = subprocess.DEVNULL if quiet else None
    child = psutil.Popen([str(part) for part in command], stderr=output)
    peak = watch(child, interval_s=0.001)
    if child.returncode:
        raise SystemExit(f"the measured process failed: {command}")
    return peak


def compare(
    llama_cpp: Path, python: str, adapter: Path, base: Path, root: Path, seconds: list[float]
) -> None:
    """Run convert_lora_to_gguf.py on the same adapter; print ratios and whether bits agree."""
    (root / "config.json").write_text(json.dumps(HF_CONFIG), encoding="utf-8")
    script = llama_cpp / "convert_lora_to_gguf.py"
    theirs = root / "theirs.gguf"
    command = [python, script, adapter, "--base", root, "--outfile", theirs, "--outtype", "f16"]
    start = time.perf_counter()
    reference_peak = peak_memory(command, quiet=True)
    reference_s = time.perf_counter() - start
    start = time.perf_counter()
    ours = root / "process.gguf"
    subprocess.run([sys.executable, "-c", MEASURED, adapter, base, ours], check=True)
    process_s = time.perf_counter() - start
    print(f"convert_lora_to_gguf.py: {reference_s:.1f} s, {reference_peak / 1e6:.0f} MB")
    print(f"  / edgelora in process: {reference_s / statistics.median(seconds):.0f}")
    print(f"  / edgelora as a new process ({process_s:.2f} s): {reference_s / process_s:.1f}")
    print(f"  tensors equal bit for bit: {same_bits(ours, theirs)}")


def same_bits(ours: Path, theirs: Path) -> bool:
    """Whether two GGUFs hold the same tensors with the same bytes."""
    mine, other = open_gguf(ours), open_gguf(theirs)
    return mine.tensors.keys() == other.tensors.keys() and all(
        mine.raw(name).tobytes() == other.raw(name).tobytes() for name in mine.tensors
    )


if __name__ == "__main__":
    main()
