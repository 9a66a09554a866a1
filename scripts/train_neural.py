"""Train the paper's Neural head for a bank: z-scored distances to costs, by an MLP.

usage: python scripts/train_neural.py BANK [--distance js --distance wd] [--device cuda]

BANK receives neural.safetensors, a table of 32 KB for each distance (heads of other distances that
are there stay). `edgelora build --operator neural --distance js` runs it with numpy.

The paper's recipe (arXiv:2507.01806 and its code): an MLP 1-4000-4000-1 with LayerNorm and ReLU on
each z-score, softmin over the other tasks, MSE between the mixture and the task's own adapter in
flat weight space (A and B as they are stored, scales ignored), 40 steps of Adam at 1e-3 on 80 % of
the tasks. The MSE is computed from the Gram matrix of the adapters, which is the same number and
needs no matrix of all adapters: any bank fits in memory.

Needs the `train` extra (torch). For 44 adapters it takes about a minute for each distance on 2 CPU
cores; time grows with the square of the number of adapters.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.bank.opening import open_bank
from edgelora.errors import BankError, EdgeLoRAError
from edgelora.files import write_atomic
from edgelora.operators.distances import DISTANCES, measure
from edgelora.operators.heads import z_scores
from edgelora.operators.neural import FILE_NAME, NeuralHead, load_heads, save_heads, tabulate
from edgelora.signature import Signature

Array = NDArray[np.float64]
MIN_ADAPTERS = 4


@dataclass(frozen=True)
class Recipe:
    """How a head is trained; the defaults are the paper's."""

    hidden: int = 4_000
    steps: int = 40
    lr: float = 1e-3
    train_share: float = 0.8
    seed: int = 42
    diagonal: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class Trained:
    """The weights of an MLP by the names of `edgelora.operators.neural.mlp`, and its losses."""

    weights: dict[str, NDArray[np.float32]]
    losses: tuple[float, ...]


def make_mlp(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(1, hidden),
        nn.LayerNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.LayerNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, 1),
    )


def weights_of(model: nn.Sequential) -> dict[str, NDArray[np.float32]]:
    names = ("w1", "b1", "g1", "c1", "w2", "b2", "g2", "c2", "w3", "b3")
    arrays = [parameter.detach().cpu().numpy() for parameter in model.parameters()]
    return dict(zip(names, arrays, strict=True))


def coefficients_of(model: nn.Sequential, z: torch.Tensor) -> torch.Tensor:
    """(k, k) z-scores to rows of coefficients with a zero diagonal."""
    k = len(z)
    others = ~torch.eye(k, dtype=torch.bool, device=z.device)
    costs = torch.full((k, k), torch.inf, device=z.device)
    costs[others] = model(z[others].unsqueeze(-1)).squeeze(-1)
    return torch.softmax(-costs, dim=1)


def mean_squared_error(
    coefficients: torch.Tensor, gram: torch.Tensor, n_weights: int
) -> torch.Tensor:
    """MSE between coefficients @ adapters and adapters (k, n), from gram = adapters @ adapters.T.

    ||(P - I) X||^2 = tr (P - I) X X^T (P - I)^T, an average over k * n entries.
    """
    gaps = coefficients - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return ((gaps @ gram) * gaps).sum() / (len(gram) * n_weights)


def train(z: Array, gram: Array, n_weights: int, recipe: Recipe) -> Trained:
    """Train on the tasks given: z (k, k) z-scored distances by row, gram (k, k)."""
    torch.manual_seed(recipe.seed)
    model = make_mlp(recipe.hidden).to(recipe.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    inputs = torch.tensor(z, dtype=torch.float32, device=recipe.device)
    products = torch.tensor(gram, dtype=torch.float32, device=recipe.device)
    losses = []
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        loss = mean_squared_error(coefficients_of(model, inputs), products, n_weights)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained(weights_of(model), tuple(losses))


def scaled_rows(distances: Array, diagonal: bool) -> Array:
    """Each row's z-scores over the others (and its own 0, with `diagonal`), 0 on the diagonal."""
    k = len(distances)
    result = np.zeros((k, k))
    for row in range(k):
        others = np.arange(k) != row
        result[row, others] = z_scores(distances[row, others], diagonal=diagonal)
    return result


def distance_matrix(name: str, signatures: Sequence[Signature]) -> Array:
    """(k, k): row i holds the distances of dataset i to all others, 0 to itself."""
    k = len(signatures)
    result = np.zeros((k, k))
    for row, target in enumerate(signatures):
        others = [i for i in range(k) if i != row]
        result[row, others] = measure(name, target, [signatures[i] for i in others])
    return result


def gram_of(adapters: Sequence[LoraFile]) -> tuple[Array, int]:
    """(k, k) products of the flattened adapters, one tensor at a time, and how long they are."""
    k, n_weights = len(adapters), 0
    gram = np.zeros((k, k))
    for name in adapters[0].names:
        pairs = [adapter.pair(name) for adapter in adapters]
        for factors in ([p.lora_a for p in pairs], [p.lora_b for p in pairs]):
            flat = np.stack([np.asarray(f, np.float32).ravel() for f in factors])
            gram += flat @ flat.T
            n_weights += flat.shape[1]
    return gram, n_weights


def usable_adapters(bank_path: Path) -> tuple[list[LoraFile], list[Signature]]:
    """The adapters of the bank that have a signature and the commonest base and shapes."""
    bank = open_bank(bank_path)
    found: list[tuple[object, LoraFile, Signature]] = []
    for record in bank.records():
        if not record.has_signature:
            print(f"{record.name}: skipped, it has no signature", file=sys.stderr)
            continue
        lora = bank.open(record.name)
        shapes = tuple((p.name, p.lora_a.shape, p.lora_b.shape) for p in lora.pairs())
        signature = bank.signature(record.name, record.base_id)
        found.append(((record.base_id, shapes), lora, signature))
    commonest = Counter(kind for kind, _, _ in found).most_common(1)
    kept = [(lora, s) for kind, lora, s in found if kind == commonest[0][0]]
    if len(kept) < len(found):
        print(f"{len(found) - len(kept)} skipped: another base or other shapes", file=sys.stderr)
    if len(kept) < MIN_ADAPTERS:
        raise BankError(f"{bank_path}: {len(kept)} usable adapters; training needs {MIN_ADAPTERS}")
    return [lora for lora, _ in kept], [signature for _, signature in kept]


def train_head(
    name: str, signatures: Sequence[Signature], gram: Array, n_weights: int, recipe: Recipe
) -> NeuralHead:
    """One head, trained on `train_share` of the tasks, with what it did as its note."""
    k = len(signatures)
    z = scaled_rows(distance_matrix(name, signatures), recipe.diagonal)
    drawn = sorted(random.Random(recipe.seed).sample(range(k), int(recipe.train_share * k)))
    part = np.ix_(drawn, drawn)
    trained = train(z[part], gram[part], n_weights, recipe)
    note = (
        f"{recipe.steps} steps, hidden {recipe.hidden}, {len(drawn)} of {k} adapters, "
        f"seed {recipe.seed}, MSE {trained.losses[0]:.4g} -> {trained.losses[-1]:.4g}"
    )
    return NeuralHead(name, recipe.diagonal, tabulate(trained.weights), note)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("--distance", action="append", choices=sorted(DISTANCES))
    parser.add_argument("--hidden", type=int, default=Recipe.hidden)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--train-share", type=float, default=Recipe.train_share)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default=Recipe.device)
    parser.add_argument(
        "--without-diagonal",
        action="store_true",
        help="leave a task's distance 0 to itself out of the z-score (the paper's code has it in)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    recipe = Recipe(
        options.hidden,
        options.steps,
        options.lr,
        options.train_share,
        options.seed,
        not options.without_diagonal,
        options.device,
    )
    target: Path = options.bank / FILE_NAME
    try:
        adapters, signatures = usable_adapters(options.bank)
        gram, n_weights = gram_of(adapters)
        heads = load_heads(target.read_bytes(), str(target)) if target.exists() else {}
        for name in options.distance or ["js"]:
            heads[name] = train_head(name, signatures, gram, n_weights, recipe)
            write_atomic(target, save_heads(heads))
            print(f"{name}: {heads[name].note}")
    except EdgeLoRAError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
