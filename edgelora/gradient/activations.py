"""What each adapter of a bank would do to the base's activations: watchers of a forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile
from edgelora.engine.score import TokenisedExample
from edgelora.errors import EdgeLoRAError
from edgelora.gradient.decoder import Decoder, PassOptions
from edgelora.gradient.packing import Pack
from edgelora.gradient.updates import refuse_misfits
from edgelora.gradient.weights import Array
from edgelora.operators import activations
from edgelora.operators.activations import top_direction, update_norms

Float64 = NDArray[np.float64]
_QUERY = "attn_q"
# Directions that are kept between the packs of a pass; those of more adapters are computed again.
_KEPT_BYTES = 256 << 20


class LogoScores:
    """`||s B A x||` of each adapter in one matrix at the last token of each prompt.

    Attributes:
        tensor: the matrix, see `logo_tensor`.
        norms: (k, n) float64.
    """

    def __init__(self, adapters: Sequence[LoraFile], n_prompts: int) -> None:
        self.tensor = logo_tensor(adapters)
        self.norms: Float64 = np.zeros((len(adapters), n_prompts))
        self._adapters = adapters

    def __call__(self, pack: Pack, name: str, x: Array) -> None:
        """The input of one matrix; its rows that predict are those of the last tokens."""
        if name != self.tensor:
            return
        rows = x[pack.outputs]
        for index, adapter in enumerate(self._adapters):
            pair = adapter.pair(name)
            found = update_norms(rows, pair.lora_a, pair.lora_b, pair.scale)
            self.norms[index, pack.owners] = found

    def coefficients(self) -> dict[str, Float64]:
        """The same (k,) for every tensor that any adapter updates."""
        row = activations.logo(self.norms)
        return dict.fromkeys(tensor_names(self._adapters), row)


class ArrowScores:
    """Arrow's routing in every matrix that any adapter updates, averaged over the tokens.

    Each token of each prompt counts once: rows of a prefix that prompts share, for each of them.
    """

    def __init__(self, adapters: Sequence[LoraFile], n_prompts: int) -> None:
        self._adapters = adapters
        names = tensor_names(adapters)
        self._owners = {n: [i for i, a in enumerate(adapters) if n in a.plan] for n in names}
        self._sums = {n: np.zeros(len(adapters)) for n in names}
        self._n_tokens = dict.fromkeys(names, 0.0)
        self._kept: dict[str, Array] = {}

    def __call__(self, pack: Pack, name: str, x: Array) -> None:
        """Add the routing of one matrix."""
        if name not in self._owners:
            return
        weights = _times_counted(pack)
        projections = (x @ self._directions(name).T).T
        shares = activations.arrow(projections, weights)
        self._sums[name][self._owners[name]] += weights.sum() * shares
        self._n_tokens[name] += float(weights.sum())

    def coefficients(self) -> dict[str, Float64]:
        """(k,) for every tensor that was seen, 0 for adapters that do not update it."""
        return {n: self._sums[n] / total for n, total in self._n_tokens.items() if total}

    def _directions(self, name: str) -> Array:
        """(adapters that update it, in) float32."""
        if name in self._kept:
            return self._kept[name]
        pairs = (self._adapters[i].pair(name) for i in self._owners[name])
        rows = [top_direction(pair.lora_a, pair.lora_b).astype(np.float32) for pair in pairs]
        directions: Array = np.stack(rows)
        if sum(kept.nbytes for kept in self._kept.values()) + directions.nbytes <= _KEPT_BYTES:
            self._kept[name] = directions
        return directions


SCORES: dict[str, type[LogoScores] | type[ArrowScores]] = {"logo": LogoScores, "arrow": ArrowScores}


def weigh_adapters(
    decoder: Decoder,
    adapters: Sequence[LoraFile],
    prompts: Sequence[TokenisedExample],
    operator: str,
    *,
    passes: PassOptions | None = None,
    progress: Callable[[int], None] = lambda n_blocks: None,
) -> dict[str, Float64]:
    """Coefficients of adapters for each tensor, (k,) on the simplex, by one pass of the base.

    Args:
        prompts: see `prompts_of`.
        operator: a name of SCORES.
        progress: called with 1 after each block of each pack.

    Raises:
        IncompatibleAdapter, UnsupportedFile: see updates.refuse_misfits.
        EdgeLoRAError: unusable prompts; for logo also adapters without a matrix in common, or that
            do nothing.
    """
    refuse_misfits(adapters, decoder.base)
    scores = SCORES[operator](adapters, len(prompts))
    try:
        decoder.watch(prompts, {}, scores, passes, progress)
        return scores.coefficients()
    except ValueError as error:
        raise EdgeLoRAError(
            f"the operator {operator} has nothing to weigh the adapters by: {error}",
            hint="Choose another --operator, such as uniform.",
        ) from error


def prompts_of(examples: Sequence[TokenisedExample]) -> list[TokenisedExample]:
    """The prompts alone; a completion of one token, never computed, marks the last token's row."""
    return [TokenisedExample(example.prompt, (0,), example.line) for example in examples]


def logo_tensor(adapters: Sequence[LoraFile]) -> str:
    """The matrix that LoGo's scores come from: the query projection of the last block.

    As in the paper; where some adapter lacks it, the last matrix that all of them update.

    Raises:
        EdgeLoRAError: there is none.
    """
    common = set(tensor_names(adapters)).intersection(*(adapter.plan for adapter in adapters))
    blocks = {n: int(m[1]) for n in common if (m := re.match(r"blk\.(\d+)\.", n))}
    if not blocks:
        raise EdgeLoRAError(
            "the operator logo compares adapters in one matrix, and these have none in common",
            hint="Choose --operator arrow, or leave some out with --exclude.",
        )
    return max(blocks, key=lambda name: (blocks[name], _QUERY in name, name))


def tensor_names(adapters: Sequence[LoraFile]) -> list[str]:
    """Every tensor that any adapter updates, once."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.plan))


def _times_counted(pack: Pack) -> Float64:
    """How many prompts each row of a pack belongs to, (t,)."""
    counts = np.ones(len(pack.tokens))
    counts[: pack.spans[-1].n_before] = len(np.unique(pack.owners))
    return counts
