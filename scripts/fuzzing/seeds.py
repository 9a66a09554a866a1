"""Real files to begin with: pico models and adapters, their banks and signatures, datasets.

Each seed is a folder of files, of which one or more are changed; its kind says what is done with
it (targets.py). All are small: a changed file is written and read tens of thousands of times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelora.adapters.base import read_base
from edgelora.adapters.merge import merge_adapters
from edgelora.bank import open_bank
from edgelora.bank.sharing import export_signatures
from edgelora.embedding_cache import open_cache
from fuzzing.gguf_parts import spoil_gguf
from fuzzing.mutations import spoil_bytes, spoil_json, spoil_lines, spoil_safetensors

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "tests"))

import bank_worker  # noqa: E402
import builds  # noqa: E402
import pico  # noqa: E402

_MAX_SEED_BYTES = 1 << 20  # of files of the folder for developers
_CHANGES = {
    ".gguf": spoil_gguf,
    ".safetensors": spoil_safetensors,
    ".json": spoil_json,
    ".jsonl": spoil_lines,
    ".csv": spoil_lines,
    ".tsv": spoil_lines,
}
# How many inputs of each kind come, in proportion.
WEIGHTS = {
    "base": 22, "lora": 20, "peft": 18, "dataset": 18, "signature": 8, "bank": 5, "sharing": 3,
    "vocabulary": 2, "card": 2, "state": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """Files by their path in a folder; those in `fixed` are never changed."""

    kind: str
    name: str
    files: Mapping[str, bytes]
    fixed: frozenset[str] = frozenset()


def make_seeds(folder: Path) -> None:
    """Write every seed, `folder`/kind/name/..., and `folder`/world, which is never changed."""
    with builds.own_world(folder / "world") as world:
        pass
    _bases(folder / "base")
    _loras(folder / "lora", world)
    _sources(folder / "peft")
    _datasets(folder / "dataset")
    _signatures(folder, world)
    _state(folder / "state", world)
    shutil.copytree(world.bank, folder / "bank" / "bank" / "bank")


def read_seeds(folder: Path) -> list[Seed]:
    """Every seed, in the order of their names."""
    seeds = []
    for kind in WEIGHTS:
        for place in sorted((folder / kind).iterdir()):
            files = {
                path.relative_to(place).as_posix(): path.read_bytes()
                for path in sorted(place.rglob("*"))
                if path.is_file() and not path.name.startswith(".lock")
            }
            fixed = {name for name in files if kind == "card" and not name.startswith("card")}
            seeds.append(Seed(kind, place.name, files, frozenset(fixed)))
    return seeds


def draw(seeds: list[Seed], seed: int, number: int) -> tuple[Seed, dict[str, bytes]]:
    """Input `number` of a run: a seed and its files, some of them changed."""
    rng = random.Random(f"{seed}-{number}")
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    chosen = rng.choice([one for one in seeds if one.kind == kind])
    files = dict(chosen.files)
    names = sorted(files.keys() - chosen.fixed)
    for name in rng.sample(names, 2 if len(names) > 1 and rng.random() < 0.1 else 1):
        files[name] = _changed(name, files[name], rng)
    return chosen, files


def _changed(name: str, data: bytes, rng: random.Random) -> bytes:
    known = _CHANGES.get(Path(name).suffix)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = known if known is not None and rng.random() < 0.75 else spoil_bytes
        data = change(data, rng)
    return data


def _bases(folder: Path) -> None:
    for architecture in pico.ARCHITECTURES:
        place = folder / architecture
        place.mkdir(parents=True)
        pico.write_base(place / "base.gguf", architecture)
    for dtype in ("Q8_0", "Q4_0", "BF16"):
        (folder / dtype).mkdir()
        pico.write_base(folder / dtype / "base.gguf", dtype=dtype, tied=False, vocabulary="bpe")
    (folder.parent / "vocabulary" / "llama").mkdir(parents=True)
    shutil.copy(folder / "llama" / "base.gguf", folder.parent / "vocabulary" / "llama")


def _loras(folder: Path, world: builds.World) -> None:
    for name, options in {
        "plain": {}, "baked": {"alpha": None, "dtype": "f16"}, "bf16": {"dtype": "bf16"},
        "q8_0": {"rank": 32, "dtype": "q8_0"},
    }.items():  # fmt: skip
        (folder / name).mkdir(parents=True)
        pico.write_random_lora(folder / name / "adapter.gguf", world.base, **options)
    records = open_bank(world.bank).records()
    for name, method in (("combined", "svd"), ("stacked", "cat")):
        (folder / name).mkdir()
        paths = [record.path for record in records[:2]]
        merge_adapters(paths, [0.5, 0.25], folder / name / "adapter.gguf", method=method)
    (folder / "of-a-bank").mkdir()
    shutil.copy(records[0].path, folder / "of-a-bank" / "adapter.gguf")


def _sources(folder: Path) -> None:
    plain = pico.write_peft(folder / "plain")
    pico.write_peft(folder / "half", dtype=__import__("numpy").float16)
    more = {
        "use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 16},
        "target_modules": r".*\.(q|k|v)_proj", "layers_to_transform": [0, 1],
        "layers_pattern": ["layers"], "exclude_modules": ["lm_head"],
    }  # fmt: skip
    pico.write_peft(folder / "patterns", config=more)
    mlx = folder / "mlx"
    mlx.mkdir()
    _write_mlx(plain, mlx)
    if shared := os.environ.get("EDGELORA_SHARED"):
        for place in sorted(Path(shared, "adapters").glob("*/*")):
            if all(path.stat().st_size < _MAX_SEED_BYTES for path in place.iterdir()):
                shutil.copytree(place, folder / f"shared-{place.name}")


def _write_mlx(peft: Path, folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    tensors = {}
    for name, array in load_file(peft / "adapter_model.safetensors").items():
        module = name.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a")
        module = module.replace("lora_B.weight", "lora_b")
        tensors[module] = np.ascontiguousarray(array.T)
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}, "model": "p"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _datasets(folder: Path) -> None:
    pairs = [{"prompt": f"is {i} odd?", "completion": f"yes {i}"} for i in range(12)]
    chat = [
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": f"What is {i}?"},
                      {"role": "assistant", "content": [{"type": "text", "text": "A number."}]}]}
        for i in range(8)
    ]  # fmt: skip
    alpaca = [{"instruction": "Add.", "input": f"{i} 1", "output": [str(i + 1)]} for i in range(9)]
    sni = {"Definition": ["Say yes."], "Instances": [{"input": f"{i}", "output": ["yes", "y"]}
                                                     for i in range(6)]}  # fmt: skip
    texts = {
        "pairs/d.jsonl": "\n".join(map(json.dumps, pairs)),
        "references/d.jsonl": "\n".join(json.dumps({**p, "references": ["a", "b"]}) for p in pairs),
        "chat/d.jsonl": "\n".join(map(json.dumps, chat)),
        "array/d.json": json.dumps(alpaca, indent=1),
        "sni/d.json": json.dumps(sni),
        "text/d.jsonl": "\n".join(json.dumps({"text": f"é {i}"}) for i in range(6)),
        "csv/d.csv": "prompt,completion\n" + "\n".join(f'"is {i}, odd?",yes {i}' for i in range(9)),
        "tsv/d.tsv": "input\toutput\n" + "\n".join(f"a {i}\tb {i}" for i in range(9)),
        "semicolons/d.csv": "prompt;completion\r\n" + "\r\n".join(f"a {i};b" for i in range(9)),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="")
    _write_parquet(folder / "parquet" / "d.parquet", pairs)
    _write_parquet(folder / "parquet-lists" / "d.parquet", alpaca)


def _write_parquet(path: Path, records: list[dict[str, object]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def _signatures(folder: Path, world: builds.World) -> None:
    base = read_base(world.base)
    for number, path in enumerate(sorted((world.bank / "adapters").glob("*.safetensors"))[:2]):
        place = folder / "signature" / f"real{number}"
        place.mkdir(parents=True)
        shutil.copy(path, place / "s.safetensors")
    place = folder / "signature" / "random"
    place.mkdir()
    signature = bank_worker.make_signature(base.identity.id)
    (place / "s.safetensors").write_bytes(signature.to_bytes())
    (folder / "sharing" / "bank").mkdir(parents=True)
    out = folder / "sharing" / "bank" / "shared.safetensors"
    export_signatures(open_bank(world.bank), base, out)
    card = {"name": "a", "source": ["x", "y"], "category": "c", "licence": "MIT",
            "description": "words", "template": "chat"}  # fmt: skip
    adapter = pico.write_peft(folder / "card" / "plain")
    (adapter / "card.json").write_text(json.dumps(card))


def _state(folder: Path, world: builds.World) -> None:
    import numpy as np

    from edgelora.gradient.adam import Track
    from edgelora.gradient.checkpoint import Checkpoint

    values = np.linspace(0, 1, 6)
    track = Track(values, values, values, values, 3)
    _write(
        folder / "checkpoint/c.safetensors", Checkpoint("k", (track,) * 2, (values,) * 2).to_bytes()
    )
    heads = (ROOT / "models" / "bank" / "neural.safetensors").read_bytes()
    _write(folder / "heads/h.safetensors", heads)
    amx = json.dumps({"libraries": [["/x", 1, 2]], "reason": ""})
    _write(folder / "amx/amx.json", amx.encode())
    manifest = {"layers": [{"mediaType": "application/vnd.ollama.image.model",
                            "digest": "sha256:" + "a" * 64}]}  # fmt: skip
    name = "ollama/manifests/registry.ollama.ai/library/pico/latest.json"
    _write(folder / name, json.dumps(manifest).encode())
    listing = {
        "sha": "0" * 40, "cardData": {"license": ["mit"]},
        "siblings": [{"rfilename": "a.gguf", "size": 9, "blobId": "1" * 40,
                      "lfs": {"sha256": "2" * 64, "size": 9}},
                     {"rfilename": "README.md", "size": 3, "blobId": "3" * 40}],
    }  # fmt: skip
    _write(folder / "hub/listing.json", json.dumps(listing).encode())
    (folder / "cache").mkdir()
    with open_cache(folder / "cache") as cache:
        cache.put("m", [[1, 2], [3]], np.ones((2, 8), np.float32))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
