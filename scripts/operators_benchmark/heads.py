"""The paper's Neural heads trained in five folds by source: no task is judged by one that saw it.

A fold's head sees nothing of the fold: its tasks are neither rows nor columns of the distances, so
that they are in no z-score either. Needs torch; what it writes is read without.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gradient_quality.bed import Bed

from edgelora.adapters.gguf_lora import open_lora
from edgelora.errors import EdgeLoRAError
from edgelora.files import write_atomic
from edgelora.operators.neural import NeuralHead, load_heads, save_heads, tabulate
from operators_benchmark.paper import DISTANCES, N_FOLDS, fold_of, head_path


def train_heads(bed: Bed, folder: Path, *, hidden: int = 4_000, steps: int = 40) -> None:
    """Train what is missing in `folder`: a head for each fold and distance, by the paper's recipe.

    Raises:
        EdgeLoRAError: torch is not installed.
    """
    try:
        import train_neural as training
    except ImportError as error:
        raise EdgeLoRAError(
            f"the Neural heads are trained with torch, which is not installed ({error})",
            hint='Install it with: pip install "edgelora[train]"',
        ) from error
    identity, folds = bed.model.base.identity.id, fold_of(bed)
    signatures = [bed.bank.signature(task, identity) for task in bed.tasks]
    files = [open_lora(bed.bank.record(task).path) for task in bed.tasks]
    recipe = training.Recipe(hidden=hidden, steps=steps)
    gram, n_weights = training.gram_of(files)
    for distance in DISTANCES:
        matrix = training.distance_matrix(distance, signatures)
        for fold in range(N_FOLDS):
            path = head_path(folder, fold)
            heads = load_heads(path.read_bytes(), str(path)) if path.is_file() else {}
            if distance in heads:
                continue
            seen = [i for i, task in enumerate(bed.tasks) if folds[task] != fold]
            part = np.ix_(seen, seen)
            z = training.scaled_rows(matrix[part], diagonal=True)
            trained = training.train(z, gram[part], n_weights, recipe)
            note = (f"{steps} steps, hidden {hidden}, {len(seen)} tasks, "
                    f"MSE {trained.losses[0]:.4g} -> {trained.losses[-1]:.4g}")  # fmt: skip
            heads[distance] = NeuralHead(distance, True, tabulate(trained.weights), note)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save_heads(heads))
            print(f"fold {fold}, {distance}: {note}", file=sys.stderr, flush=True)
