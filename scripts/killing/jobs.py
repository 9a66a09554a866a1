"""The commands that are killed: what each needs in its folder, and what it must never leave there.

Everything is made of pico models (tests/pico.py), so that a command takes a second.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgelora.bank import open_bank
from edgelora.bank.verify import verify
from edgelora.errors import EdgeLoRAError
from edgelora.files import TEMPORARY_PREFIX

sys.path.append(str(Path(__file__).parent.parent.parent / "tests"))

import builds  # noqa: E402
import hub_server  # noqa: E402
import pico  # noqa: E402

TASKS = {
    "task022": "task022_cosmosqa_passage_inappropriate_binary",
    "task033": "task033_winogrande_answer_generation",
    "task190": "task190_snli_classification",
}
BASE_REPOSITORY, BASE_FILE = "me/pico", "pico.gguf"
_COLLECTION = "Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16"
_WHOLE_BANK = ("bank.json", "adapters", "index.sqlite", ".lock", ".lock-pull", "downloads")

Tree = Mapping[str, str]  # path in the folder -> hash of the file ("" where bytes may differ)


@dataclass(frozen=True)
class Material:
    """What commands work with; nothing of it is ever changed.

    Attributes:
        world: a base, a bank of four adapters for it, and datasets.
        hub: a Hub on this machine that has three adapters of Lots-of-LoRAs and a base.
    """

    world: builds.World
    folders: tuple[Path, ...]
    hub: hub_server.Hub

    def environment(self, folder: Path) -> dict[str, str]:
        """Of a command that may write into `folder` only."""
        own = {name: str(folder / "tmp") for name in ("TMPDIR", "TEMP", "TMP")}
        own |= {"EDGELORA_CACHE": str(folder / "cache"), "EDGELORA_MODELS": str(folder / "models")}
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return {**os.environ, **own, **threads, "HF_ENDPOINT": self.hub.url, "HF_TOKEN": "hf_none"}


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        words: of the command, for a folder of its own.
        prepare: puts into the folder what is there before the command.
        check: problems of the folder after a kill, given the tree that a whole run leaves.
        writes: the folders that it writes to, but for caches.
    """

    name: str
    words: Callable[[Material, Path], list[object]]
    prepare: Callable[[Material, Path], None]
    check: Callable[[Path, Tree], list[str]]
    writes: tuple[str, ...]


@contextmanager
def make_material(folder: Path) -> Iterator[Material]:
    """Write it, and serve the Hub, for the block."""
    with builds.own_world(folder / "world") as world, hub_server.serve() as hub:
        folders = []
        for i in range(4):
            adapter = pico.write_peft(folder / "new" / f"task{i}", seed=10 + i, size=1.0)
            prompts = [f"is {i} {j} in the house?" for j in range(12)]
            builds.write_lines(adapter / "train.jsonl", prompts, [f"yes {j}" for j in range(12)])
            folders.append(adapter)
        _publish(hub, folder / "published", world.base)
        yield Material(world, tuple(folders), hub)


def _publish(hub: hub_server.Hub, folder: Path, base: Path) -> None:
    for seed, (number, task) in enumerate(TASKS.items()):
        adapter = pico.write_peft(folder / number, rank=16, alpha=32, seed=20 + seed)
        hub.add_folder(f"{_COLLECTION}-{number}", adapter)
        name = f"Lots-of-LoRAs/{task}"
        path = "data/train-00000-of-00001.parquet"
        hub.add(name, {path: _parquet(folder / f"{number}.parquet", seed)}, kind="datasets")
    hub.add(BASE_REPOSITORY, {BASE_FILE: base.read_bytes()}, licence="mit")


def _parquet(path: Path, seed: int) -> bytes:
    import pyarrow
    import pyarrow.parquet

    prompts = [
        f"Definition: Is {seed} in it?\n\nNow complete the following example -\n"
        f"Input: {i} {seed}\nOutput:"
        for i in range(12)
    ]
    columns = {"input": prompts, "output": [[f"yes {i}"] for i in range(12)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.read_bytes()


def tree(folder: Path) -> Tree:
    """Every file with its hash; of databases the name only, of locks nothing."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.startswith(".lock"):
            continue
        is_cache = ".sqlite" in path.name or path.name == "amx.json"
        digest = "" if is_cache else hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = digest
    return found


def temporary_files(folder: Path) -> list[Path]:
    """What a killed process left, in the folder and in its folder of temporary files."""
    marked = [path for path in folder.rglob(f"{TEMPORARY_PREFIX}*")]
    return marked + [path for path in (folder / "tmp").iterdir()]


def _nothing(_material: Material, _folder: Path) -> None:
    pass


def _copy_bank(material: Material, folder: Path) -> None:
    shutil.copytree(material.world.bank, folder / "bank")


def _add(material: Material, folder: Path) -> list[object]:
    return ["bank", "add", *material.folders, "--bank", folder / "bank", "--base",
            material.world.base, "--data-glob", "{folder}/train.jsonl", "--threads", 1]  # fmt: skip


def _build(*more: object) -> Callable[[Material, Path], list[object]]:
    def words(material: Material, folder: Path) -> list[object]:
        return ["build", "--base", material.world.base, "--bank", folder / "bank", "--data",
                material.world.helped, "-o", folder / "out" / "built.gguf", "--threads", 1,
                "--anew", *more]  # fmt: skip

    return words


def _pull_bank(material: Material, folder: Path) -> list[object]:
    return ["pull", "bank", "lots-of-loras", "--base", material.world.base, "--bank",
            folder / "bank", "--threads", 1, "--tasks", "task022", "--tasks", "task033",
            "--tasks", "task190"]  # fmt: skip


def _pull_base(_material: Material, _folder: Path) -> list[object]:
    return ["pull", "base", BASE_REPOSITORY]


def _check_bank(folder: Path, whole: Tree) -> list[str]:
    """The bank, if there is one yet, is whole but for temporary files; so is each adapter."""
    bank = folder / "bank"
    if not (bank / "bank.json").is_file():
        names = [path.name for path in bank.iterdir()] if bank.is_dir() else []
        allowed = (*_WHOLE_BANK[1:], TEMPORARY_PREFIX)
        return [f"{name}: in a bank without bank.json" for name in names if
                not name.startswith(allowed)]  # fmt: skip
    try:
        problems = verify(open_bank(bank))
    except EdgeLoRAError as error:
        if not (bank / "adapters").is_dir():
            return []
        return [str(error)]
    return [p for p in problems if not p.startswith(TEMPORARY_PREFIX)] + _differing(folder, whole)


def _check_output(folder: Path, whole: Tree) -> list[str]:
    """The bank is as it was; what is not temporary is as a whole run leaves it."""
    return _check_bank(folder, whole) + _differing(folder, whole)


def _differing(folder: Path, whole: Tree) -> list[str]:
    """Files that a whole run leaves too, with other bytes."""
    now = tree(folder)
    return [
        f"{path}: not as a whole run leaves it"
        for path, digest in now.items()
        if path in whole and digest != whole[path]
    ]


JOBS = (
    Job("bank add", _add, _nothing, _check_bank, ("bank",)),
    Job("build", _build("--refine", "forward"), _copy_bank, _check_output, ("out",)),
    Job(
        "build with gradients",
        _build("--refine", "gradient", "--passes", 2, "--polish", 1),
        _copy_bank,
        _check_output,
        ("out",),
    ),
    Job("pull bank", _pull_bank, _nothing, _check_bank, ("bank",)),
    Job("pull base", _pull_base, _nothing, _differing, ("models",)),
)
