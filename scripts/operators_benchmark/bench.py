"""Where arms work: a case, a context for losses, and what several arms measure alike."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gradient_quality.arms import Bench as GradientBench
from gradient_quality.bed import Case
from numpy.typing import NDArray

from edgelora.adapters.merge import merge_adapters
from edgelora.build import proposals
from edgelora.build.alone import Measured, measure_adapters
from edgelora.build.pool import Pool
from edgelora.build.proposals import Nearness
from edgelora.build.trials import Budget, make_trial, try_scales
from edgelora.embedding_cache import open_cache
from edgelora.engine.context import Context, open_context
from edgelora.engine.model import WeightedAdapter
from edgelora.engine.score import TokenisedExample, count_tokens, mean_loss, score
from edgelora.signature import Histogram, Signature
from edgelora.summarise import (
    DEFAULT_N_EMBEDDED,
    count_embedded_tokens,
    sample_examples,
    summarise_examples,
    token_ids,
)
from operators_benchmark.costs import Meter

Array = NDArray[np.float64]
UNLIMITED = 10**12
UNCUT = 1 << 20  # no tensor has a rank as large: nothing is lost


@dataclass(frozen=True, eq=False)
class Made:
    """What an arm made.

    Attributes:
        adapters: what llama.cpp applies; [] is the base.
        facts: what else the line of results says.
        coefficients: (k,) of the pool's adapters, scale included; None where there are none.
        test: token ids of the test lines where they differ from the case's own.
    """

    adapters: list[WeightedAdapter]
    facts: dict[str, Any] = field(default_factory=dict)
    coefficients: Array | None = None
    test: list[TokenisedExample] | None = None


@dataclass(frozen=True, eq=False)
class Bench:
    """One case at work.

    Attributes:
        n_labels: 0 where the support lines carry no completions.
        context: for losses; no adapter is applied between arms.
        folder: of this case, emptied after each arm.
        heads: where the Neural heads of the folds lie; see heads.py.
        n_prompt: tokens that a prompt with examples before it may have.
    """

    case: Case
    n_labels: int
    context: Context
    folder: Path
    heads: Path
    n_prompt: int = 768
    meter: Meter = field(default_factory=Meter)

    @property
    def pool(self) -> Pool:
        """The adapters that may be combined."""
        return self.case.pool

    @property
    def k(self) -> int:
        """How many they are."""
        return len(self.pool.records)

    @property
    def texts(self) -> list[TokenisedExample]:
        """The support lines as token ids; without completions where there are no labels."""
        return self.case.texts

    def new_folder(self) -> Path:
        """For files of one trial."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def for_gradients(self, arm: str, case: Case | None = None) -> GradientBench:
        """The same for arms of the gradient benchmark; checkpoints of an arm are its own."""
        folder = self.folder / re.sub(r"[^\w.=-]", "_", arm)
        folder.mkdir(exist_ok=True)  # kept when a run is killed, so that a descent goes on
        return GradientBench(case or self.case, self.context, folder)

    def support_loss(self, adapters: Sequence[WeightedAdapter]) -> float:
        """Nats a token on the support lines, paid for; nothing stays applied."""
        self.meter.spend(count_tokens(self.texts))
        self.context.apply(adapters)
        loss = mean_loss(score(self.context, self.texts))
        self.context.apply([])
        return loss

    def counts(self) -> Signature:
        """The support lines' token counts as a signature that says nothing else."""
        return self.meter.shared("counts", self._count)

    def _count(self) -> Signature:
        model = self.case.bed.model
        flat = [i for example in self.case.support for i in token_ids(model, example)]
        ids, n = np.unique(np.array(flat, np.int64), return_counts=True)
        histogram = Histogram(ids.astype(np.int32), n.astype(np.int32))
        return replace(self.pool.others[0], histogram=histogram, n_tokens=len(flat))

    def signature(self) -> Signature:
        """The support lines' signature, embedded by the base."""
        return self.meter.shared("signature", self._embed)

    def _embed(self) -> Signature:
        case = self.case
        sample = sample_examples(case.support, DEFAULT_N_EMBEDDED, case.seed)
        self.meter.spend(count_embedded_tokens(case.bed.model, sample))
        with open_context(case.bed.model, hidden=True) as context, open_cache() as cache:
            return summarise_examples(
                context, case.support, cache=cache, n_layers=self.pool.n_layers, seed=case.seed
            )

    def nearness(self, distance: str = "bures") -> Nearness:
        """Distances on embeddings to every adapter's dataset, as `build` measures them."""
        return proposals.compare(self.pool, self.signature(), distance, self.case.seed)

    def measured(self) -> Measured:
        """The base's and every single adapter's states on the support lines."""
        return self.meter.shared("measured", self._measure)

    def _measure(self) -> Measured:
        model = self.case.bed.model
        self.meter.spend((1 + self.k) * count_tokens(self.texts))
        with open_context(model, hidden=True) as context:
            return measure_adapters(context, self.pool, list(range(self.k)), self.texts)

    def scaled(self, name: str, coefficients: Array) -> Made:
        """A combination at the scale that is best on the support lines; at 1 without labels."""
        trial = make_trial(name, coefficients, self.pool.paths, self.new_folder())
        if self.n_labels:
            budget = Budget(UNLIMITED)
            trial = try_scales(self.context, trial, self.texts, budget)
            self.context.apply([])
            self.context.model.unload(trial.path)
            self.meter.spend(budget.n_used)
        scale = trial.candidate.scale
        facts: dict[str, Any] = {"chosen": name, "scale": round(scale, 4)}
        if self.n_labels:
            facts["support_loss"] = round(trial.loss, 5)
        return Made(trial.weighted(), facts, trial.candidate.coefficients * scale)

    def combined(
        self, coefficients: Array, *, combine: str = "exact", rank: int | str = "auto"
    ) -> Made:
        """A combination as it is.

        Args:
            combine: "exact" keeps all of it, "linear" averages the factors as the paper's code
                does, "svd" cuts it to `rank`.
        """
        used = np.flatnonzero(coefficients)
        if not len(used):
            return Made([], {}, coefficients)
        path = self.new_folder() / "combined.gguf"
        settings: dict[str, Any] = {"method": "linear"}
        if combine != "linear":
            settings = {"method": "svd", "rank": UNCUT if combine == "exact" else rank}
        files = [self.case.adapters[i] for i in used]
        report = merge_adapters(files, [float(coefficients[i]) for i in used], path, **settings)
        facts = {"rank": report.max_rank, "merge_error": round(report.error, 4)}
        return Made([WeightedAdapter(path)], facts, coefficients)


def _silent(done: int, total: int) -> None:
    """Progress is told arm by arm."""
