"""A pico bed on disk: a base, PEFT adapters for it, and a dataset with a card for each."""

from __future__ import annotations

import json
from pathlib import Path

import builds
import pico

SOURCES = ("x", "y", "y", "z")
CATEGORIES = ("a", "a", "b", "b")


def write_bed(folder: Path, *, n_train: int = 24, n_test: int = 8) -> Path:
    """`base.gguf` and `data/task{0,1,2,3}/{adapter/, train.jsonl, test.jsonl, task.json}`.

    task1 and task2 are of one source; categories cross it.
    """
    pico.write_base(folder / "base.gguf")
    for i, (source, category) in enumerate(zip(SOURCES, CATEGORIES, strict=True)):
        task = folder / "data" / f"task{i}"
        task.mkdir(parents=True)
        pico.write_peft(task / "adapter", seed=i, size=0.5)
        for name, n in (("train", n_train), ("test", n_test)):
            prompts = [f"is the cat {i} on the hill {name} {j}?" for j in range(n)]
            builds.write_lines(task / f"{name}.jsonl", prompts, ["yes", "no"] * (n // 2))
        card = {"task": f"task{i}", "source": [source], "category": [category], "licence": "MIT"}
        (task / "task.json").write_text(json.dumps(card))
    return folder
