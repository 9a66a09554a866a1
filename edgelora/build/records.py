"""What a person may choose about a build, what it says before it starts, and what it made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelora.adapters.merge import MergeReport
from edgelora.operators.arbiter import Verdict

DEFAULT_BUDGET = 120_000
DEFAULT_LIMIT_S = 600.0
AUTO = "auto"
REFINEMENTS = (AUTO, "none", "forward", "gradient")
DEFAULT_DISTANCE = "bures"
CROSSED = "cross-validated"


@dataclass(frozen=True)
class Options:
    """What a person may choose; the defaults are the tool's own choice.

    Attributes:
        distance: a name of operators.distances.DISTANCES.
        operator: "auto" compares all candidates; a name writes that operator's combination, if it
            beats the base; "none" combines nothing, so that `polish` trains a LoRA from scratch.
        refine: "none" proposes by distances only, "forward" from the losses of single adapters
            too, "gradient" by steps on coefficients from gradients through the base; "auto" is
            "gradient" where it can be had (see automatic.settle_refinement), else "forward".
        passes, weights: see gradient.descent.DescentOptions.
        objective: that of the gradient; "" is "loss", or "prompts" without completions.
        polish: passes of training of the best candidate's own factors afterwards.
        budget_tokens: tokens that all forward passes together may compute; a gradient pass
            counts three.
        limit_s: the budget, or the number of gradient passes, is cut to what a short test says
            that the base computes meanwhile, so that a slow machine is not busy for hours. Not
            with activations.
        combine, rank, dtype: see adapters.merge.merge_adapters.
        exclude: glob patterns of adapter names to leave out.
        calibrated: use the temperatures, shortlist and priors that `edgelora bank calibrate`
            fitted on the bank, where it did.
        reuse: keep what the build finds in the cache folder, and start at the merge where an equal
            build has been measured on this machine.
        force: overwrite the output, and write the best candidate even if the base is better.
    """

    distance: str = DEFAULT_DISTANCE
    operator: str = "auto"
    refine: str = AUTO
    passes: int = 10
    weights: str = "component"
    objective: str = ""
    polish: int = 0
    budget_tokens: int = DEFAULT_BUDGET
    limit_s: float = math.inf
    combine: str = "svd"
    rank: int | str = "auto"
    dtype: str = "f16"
    seed: int = 0
    exclude: tuple[str, ...] = ()
    calibrated: bool = True
    reuse: bool = False
    force: bool = False

    @property
    def needs_gradients(self) -> bool:
        """Whether the base's gradient is computed at all."""
        return self.refine == "gradient" or self.polish > 0

    @property
    def may_need_gradients(self) -> bool:
        """Whether it is, or may come to be."""
        return self.needs_gradients or (self.refine == AUTO and self.operator == AUTO)


@dataclass(frozen=True)
class GradientPlan:
    """What gradients are about to cost.

    Attributes:
        n_examples: support examples that they are computed on, of n_rows tokens in one pass.
        n_passes: on coefficients, at most; each is n_folds descents on their part of the examples.
        n_held_out: other examples that stop the descent where it has no folds.
        n_polish: on factors.
        n_tokens: forward-equivalents in all, at most; a gradient pass counts three.
        tokens_per_s: forward-equivalents a second in a short test a moment ago.
        memory_bytes: estimate of the memory they take beside the mapped weights.
        on_disk: whether the blocks' inputs are kept in a temporary file.
    """

    n_examples: int
    n_rows: int
    n_passes: int
    n_folds: int
    n_held_out: int
    n_polish: int
    n_tokens: int
    tokens_per_s: float
    memory_bytes: int
    on_disk: bool


@dataclass(frozen=True)
class Plan:
    """What a build is about to do, told before the long part.

    Attributes:
        n_measured: adapters whose loss is measured, of the `n_adapters` that fit the base.
        n_shown: support examples that each of them is measured on (the shortest).
        n_tokens: estimate of all tokens that the build computes.
        n_done: of these, computed before the plan is told.
        by: what decides where nothing is measured: "distances", "activations",
            "description" or "an earlier build".
        tokens_per_s: speed of the first adapters' passes a moment ago; NaN where there is none.
        merge_s: estimate of what combining adapters takes in all.
        is_cut: whether the budget is that of `Options.limit_s`.
        gradient: what gradients cost; it is a part of n_tokens.
    """

    n_support: int
    n_selection: int
    n_untouched: int
    n_adapters: int
    n_measured: int
    n_shown: int
    n_tokens: int
    budget_tokens: int
    tokens_per_s: float
    gradient: GradientPlan | None = None
    by: str = "distances"
    merge_s: float = 0.0
    is_cut: bool = False
    n_done: int = 0

    @property
    def seconds(self) -> float:
        """What the build takes from here; NaN where the speed is not known."""
        n_forward = self.n_tokens - self.n_done
        if self.gradient is None:
            return self.merge_s + (n_forward / self.tokens_per_s if n_forward else 0.0)
        n_forward -= self.gradient.n_tokens
        forward = n_forward / self.tokens_per_s if math.isfinite(self.tokens_per_s) else 0.0
        return forward + self.merge_s + self.gradient.n_tokens / self.gradient.tokens_per_s


@dataclass(frozen=True)
class PassLoss:
    """The end of one pass over the examples, nats a token.

    Attributes:
        stage: "coefficients" or "factors".
        n_done: passes; 0 is the start.
        support: as met before each step; NaN at the start.
        held_out: cross-validated; None without folds.
    """

    stage: str
    n_done: int
    n_passes: int
    support: float
    held_out: float | None


@dataclass(frozen=True)
class Refined:
    """How coefficients were found by gradients.

    Attributes:
        start: the candidate that the descent began at.
        n_passes: at which it was stopped.
        support_losses, held_out_losses: see gradient.descent.Descended.
        slopes: by adapter, of the loss along its coefficient at the base: negative is better; {}
            where the time of ranking was kept for a pass.
        n_sources: adapters that took part.
    """

    start: str
    weights: str
    objective: str
    n_examples: int
    n_passes: int
    support_losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    slopes: Mapping[str, float]
    n_sources: int


@dataclass(frozen=True)
class Trained:
    """How the factors of an adapter were trained.

    Attributes:
        start: the candidate that they come from; "" for factors from scratch.
        n_passes: that were finished.
        support_losses: in each pass, as met before each step.
    """

    start: str
    n_examples: int
    n_passes: int
    support_losses: tuple[float, ...]


@dataclass(frozen=True)
class Judgement:
    """The last comparison: the finished file, loaded, against the base, in nats a token.

    Attributes:
        part: "untouched"; with fewer than 24 examples "cross-validated" (the chosen candidate, each
            example under coefficients that were found without its fold), or, where a search that
            sees all examples took part, "selection part, optimistic": so too with 24 to 127
            examples and gradients, which leave none untouched.
        interval: 95 % paired bootstrap of adapter - base, (low, mid, high).
    """

    part: str
    n_examples: int
    base_loss: float
    adapter_loss: float
    interval: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Built:
    """What was written, and why.

    Attributes:
        chosen: the candidate that was written.
        coefficients: by adapter, the global scale included; zeros left out. Where they differ
            from tensor to tensor these are the means.
        distances: by adapter, of those that have a signature.
        losses_alone: by adapter, its support loss alone.
        support_losses: by candidate, at its best scale, on the support examples shown.
        verdict: of the selection part; None where nothing could be measured.
        judgement: None where nothing could be measured.
        merge: None where nothing was combined.
        seconds: by stage, see clock.Clock.
        plan: with its estimate, and after how many seconds (`planned_s`) it was told.
        refined, trained: what gradients did to coefficients and factors, chosen or not.
    """

    out: Path
    chosen: str
    coefficients: dict[str, float]
    distances: dict[str, float]
    losses_alone: dict[str, float]
    support_losses: dict[str, float]
    verdict: Verdict | None
    judgement: Judgement | None
    merge: MergeReport | None
    n_tokens: int
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]
    plan: Plan | None = None
    planned_s: float = 0.0
    refined: Refined | None = None
    trained: Trained | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds that the build took."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Listener:
    """Told what a build does; the command line draws it.

    Attributes:
        plan: the plan, once.
        progress: (stage, steps done, steps in all).
        warn: each warning, as it arises.
        passed: the losses after each pass of gradient steps.
        keep: asked after Ctrl-C in such steps, with a question: whether to go on with the best
            result so far. If not, the state stays and the interruption goes on.
    """

    plan: Callable[[Plan], None] = lambda plan: None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    warn: Callable[[str], None] = lambda message: None
    passed: Callable[[PassLoss], None] = lambda losses: None
    keep: Callable[[str], bool] = lambda question: False


def count_steps(
    stage: str, total: int, progress: Callable[[str, int, int], None]
) -> Callable[[int], None]:
    """What is called with the steps just done, as progress of a stage of about `total` steps."""
    done = 0

    def advance(n_steps: int) -> None:
        nonlocal done
        done += n_steps
        progress(stage, done, max(done, total))

    return advance
