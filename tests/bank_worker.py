"""A process that adds adapters to a bank, to be killed.

    python bank_worker.py BANK BASE STAGE FOLDER...

It ends itself, with no clean-up, the first time that the stage is reached ("" for never).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from edgelora.adapters.base import read_base
from edgelora.bank import Facts, open_bank
from edgelora.bank.adding import Outcome, Request, add_many
from edgelora.signature import Signature, summarise

KILLED = 9


def make_signature(base_id: str, seed: int = 0) -> Signature:
    """A signature of random embeddings, without an engine."""
    rng = np.random.default_rng(seed)
    prompts = rng.standard_normal((12, 32)).astype(np.float32)
    return summarise(prompts, prompts + 1, [[1, 2, 3]] * 12, n_vocab=300, base_id=base_id)


def add(bank: Path, base_path: Path, folders: list[Path], stage: str = "") -> list[Outcome]:
    """Add the folders, each with a signature of its name."""
    base = read_base(base_path)
    requests = [Request(folder, facts=Facts(description=folder.name)) for folder in folders]

    def step(reached: str) -> None:
        if reached == stage:
            os._exit(KILLED)

    return add_many(
        open_bank(bank, create=True),
        base,
        requests,
        embed=lambda what: make_signature(base.identity.id),
        step=step,
    )


if __name__ == "__main__":
    bank, base_path, stage, *names = sys.argv[1:]
    print("ready", flush=True)
    outcomes = add(Path(bank), Path(base_path), [Path(name) for name in names], stage)
    print([f"{o.folder.name}: {o.reason}" for o in outcomes if o.reason] or "", flush=True)
    sys.exit(any(o.reason for o in outcomes))
