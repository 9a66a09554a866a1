"""A bed: a base, a bank of adapters and the dataset of each; cases with their own source hidden."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from edgelora.adapters.base import Base, read_base
from edgelora.adapters.gguf_lora import LoraFile, open_loras
from edgelora.bank.adding import REFUSED, add_many
from edgelora.bank.embedding import open_embedder
from edgelora.bank.opening import open_bank
from edgelora.bank.requests import make_requests
from edgelora.bank.store import Bank
from edgelora.build.pool import Pool, open_pool
from edgelora.datasets.records import Example
from edgelora.datasets.template import Template
from edgelora.engine.model import Model, ModelOptions, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.engine.score import TokenisedExample
from edgelora.gradient.decoder import Decoder, open_decoder
from edgelora.leave_one_out import splits
from edgelora.leave_one_out.cases import draw

N_PROMPTS = 16  # what a person without labels brings


@dataclass(frozen=True, eq=False)
class Bed:
    """A base opened in llama.cpp and as a decoder, with a bank and a dataset for each adapter.

    Attributes:
        decoder: as `build` has it; exact: with all products in float32.
    """

    name: str
    model: Model
    decoder: Decoder
    exact: Decoder
    template: Template
    bank: Bank
    data: Path

    @cached_property
    def tasks(self) -> list[str]:
        """Adapters of the bank that have a dataset."""
        return sorted(r.name for r in self.bank.records() if (self.data / r.name).is_dir())

    @cached_property
    def origins(self) -> dict[str, splits.Origin]:
        """Sources and categories of each task, by its card."""
        found = {}
        for task in self.tasks:
            card = json.loads((self.data / task / "task.json").read_text(encoding="utf-8"))
            parts = (card["source"], card.get("category", ()))
            found[task] = splits.Origin(*(frozenset(map(str, part)) for part in parts))
        return found

    def source(self, task: str) -> frozenset[str]:
        """The datasets that a task was made from."""
        return self.origins[task].sources

    def hidden(self, task: str, split: str = "source") -> list[str]:
        """Adapters that a task must do without, its own among them; see splits.hidden."""
        return splits.hidden(task, self.origins, split)


@dataclass(frozen=True, eq=False)
class Case:
    """One task as a person would bring it: a few examples, and a bank that never saw its source.

    Attributes:
        support: with 0 labels, N_PROMPTS lines without their completions.
        split: what of the bank is hidden; see splits.SPLITS.
        own: the adapter that was trained on the task's whole training set.
    """

    bed: Bed
    task: str
    seed: int
    support: tuple[Example, ...]
    test: tuple[Example, ...]
    split: str = "source"

    @cached_property
    def pool(self) -> Pool:
        """The adapters that may be combined."""
        hidden = self.bed.hidden(self.task, self.split)
        return open_pool(self.bed.bank, self.bed.model.base.identity, hidden)

    @cached_property
    def adapters(self) -> list[LoraFile]:
        """The pool's files, opened."""
        return open_loras(self.pool.paths)

    @cached_property
    def own(self) -> Path:
        """The task's own adapter."""
        return self.bed.bank.record(self.task).path

    @cached_property
    def texts(self) -> list[TokenisedExample]:
        """The support examples as token ids."""
        return tokenise_examples(self.bed.model, self.bed.template, self.support)

    @cached_property
    def test_texts(self) -> list[TokenisedExample]:
        """The test examples as token ids."""
        return tokenise_examples(self.bed.model, self.bed.template, self.test)


def make_case(
    bed: Bed, task: str, *, n_labels: int, n_test: int, seed: int, split: str = "source"
) -> Case:
    """Support and test lines, drawn by the seed; those of fewer labels are among those of more."""
    support = draw(bed.data, task, "train", n_labels or N_PROMPTS, seed=seed)
    if not n_labels:
        support = tuple(replace(line, completion=None, references=()) for line in support)
    test = draw(bed.data, task, "test", n_test, seed=seed)
    return Case(bed, task, seed, support, test, split)


@contextlib.contextmanager
def open_bed(
    name: str, base: Path, bank: Path, data: Path, *, n_threads: int, low_ram: bool = False
) -> Iterator[Bed]:
    """Open a base with its bank; data holds `<adapter>/train.jsonl`, test.jsonl and task.json."""
    options = ModelOptions(n_threads=n_threads, low_ram=low_ram)
    with open_model(base, options) as model:
        n_threads = options.threads()
        decoder = open_decoder(base, n_threads=n_threads, exact=False)
        exact = open_decoder(base, n_threads=n_threads)
        yield Bed(name, model, decoder, exact, model_template(model), open_bank(bank), data)


def make_bank(folder: Path, base_path: Path, data: Path) -> Path:
    """A bank in `folder` of the PEFT adapters `data/<task>/adapter`; only what is missing is made.

    Raises:
        SystemExit: an adapter was refused.
    """
    base: Base = read_base(base_path)
    requests, refused = make_requests(
        sorted(data.glob("*/adapter")),
        data_glob="{parent}/train.jsonl",
        card_glob="{parent}/task.json",
    )
    with open_embedder(base_path) as embed:
        outcomes = refused + add_many(
            open_bank(folder, create=True), base, requests, embed=embed, dtype="f16"
        )
    wrong = [f"{o.folder}: {o.reason}" for o in outcomes if o.status == REFUSED]
    if wrong or not outcomes:
        sys.exit("\n".join(wrong) or f"{data}: no adapters")
    return folder
