"""A build from a description alone: the adapters whose prompts are most like it, combined."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from edgelora.bank import Bank
from edgelora.build.finish import make_built, publish_unjudged, write_combination
from edgelora.build.measuring import plan_unmeasured
from edgelora.build.proposals import ACTIVATED, NONE, ON_LOSSES, Nearness, compare, propose
from edgelora.build.records import Built, Listener, Options
from edgelora.build.run import folder_beside, open_work
from edgelora.build.trials import Recipe, Trial, settled
from edgelora.build.work import Work
from edgelora.datasets.template import Template
from edgelora.embedding_cache import open_cache
from edgelora.engine.context import open_context
from edgelora.engine.model import Model
from edgelora.errors import BankError, DatasetError, EdgeLoRAError
from edgelora.operators.arbiter import Candidate
from edgelora.signature.record import description_problems
from edgelora.summarise import embedded_ids, summarise_text

# A description is one point: only the means of datasets can be compared with it.
DESCRIBED_DISTANCE = "cosine"
_OPERATOR = "attentional"


def build_described(
    model: Model,
    bank: Bank,
    description: str,
    template: Template,
    out: Path,
    options: Options | None = None,
    listener: Listener | None = None,
) -> Built:
    """Write one adapter for a task that is described in words, without a single example.

    The description is embedded as the prompts of the bank's datasets are, and the adapters are
    weighed by how near their prompts are to it on average. Nothing measures whether it helps.

    Args:
        description: of the task, at most 2,000 characters; it is recorded in the file.
        options: by default with the distance DESCRIBED_DISTANCE; the operator auto is attentional.

    Raises:
        DatasetError: the description is empty or too long.
        BankError: no adapter of the bank is for this base, or none has a signature.
        AlreadyExists, EdgeLoRAError: see run.build; options that need examples.
    """
    options = options or Options(distance=DESCRIBED_DISTANCE)
    _refuse(description, options)
    operator = _OPERATOR if options.operator == "auto" else options.operator
    work = open_work(model, bank, template, out, options, listener or Listener())
    nearness = _compare(work, description)
    work.listener.plan(plan_unmeasured(work, 1, "description"))
    ((name, coefficients),) = propose(work.pool, nearness, None, operator)
    told = {"description": description}
    candidate = Candidate(name, settled(coefficients))
    with folder_beside(out):
        write = partial(write_combination, work, candidate, nearness, recipe=Recipe(told))
        merge = publish_unjudged(work, nearness, write)
    return make_built(work, Trial(candidate, out), nearness, None, {}, merge)


def _refuse(description: str, options: Options) -> None:
    problems = description_problems(description)
    if not description.strip() or problems:
        raise DatasetError("no description that can be embedded", problems=problems or ["empty"])
    if options.needs_gradients or options.objective:
        raise EdgeLoRAError(
            "a description is no example to take gradients on",
            hint="Leave --refine gradient, --objective and --polish out, or give --data.",
        )
    if options.operator in (NONE, *ON_LOSSES, *ACTIVATED):
        raise EdgeLoRAError(
            f"the operator {options.operator} needs examples, and there is only a description",
            hint="Choose an operator on distances, such as --operator attentional, or give --data.",
        )


def _compare(work: Work, description: str) -> Nearness:
    """The distances of the description, embedded, to the datasets of the bank's adapters."""
    if not work.pool.signed:
        raise BankError(
            f"{work.pool.folder}: no adapter has a signature to compare a description with",
            hint="Add the datasets with `edgelora bank add --data-glob`.",
        )
    work.warn(
        "a description alone: adapters whose prompts are most like it are combined, and nothing "
        "measures whether that helps; a few examples would tell"
    )
    work.spend(len(embedded_ids(work.model.vocabulary, description)), "the description")
    with open_context(work.model, hidden=True) as context, open_cache() as cache:
        target = summarise_text(
            context,
            description,
            cache=cache,
            n_layers=work.pool.n_layers,
            seed=work.options.seed,
        )
    return compare(work.pool, target, work.options.distance, work.options.seed)
