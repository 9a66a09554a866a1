"""To build from: a pico base, a bank of random adapters, and answers under one of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pico
import pytest

from edgelora.adapters.base import read_base
from edgelora.bank import Facts, open_bank
from edgelora.bank.adding import Request, add_many
from edgelora.bank.embedding import open_embedder
from edgelora.datasets.records import Example, Message
from edgelora.datasets.split import split_examples
from edgelora.engine.context import open_context
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.engine.score import score

ONE_THREAD = ModelOptions(n_threads=1)
N_ADAPTERS = 4
HELPER = "adapter1"
_ANSWERS = ("yes", "no", "he is", "with them", "7", "from this", "at it", "for you", "K", "that")
_SUBJECTS = "the cat|a dog|this man|that bird|his word|the boat|her hat|a tree".split("|")
_PLACES = "in the house|on the hill|with them|from this|at the end|for you".split("|")


@dataclass(frozen=True)
class World:
    """Paths of a base and a bank for it, and of datasets of 32 lines.

    Attributes:
        helped: every answer is one that HELPER makes likelier.
        hopeless: so it is in the support part, but where candidates are compared adapters hurt.
        deceptive: adapters hurt in the untouched part only.
    """

    base: Path
    bank: Path
    helped: Path
    hopeless: Path
    deceptive: Path
    unanswered: Path


@contextlib.contextmanager
def own_world(folder: Path) -> Iterator[World]:
    """A world in `folder`, made with a cache of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_CACHE", str(folder / "cache"))
        yield make_world(folder)


def make_world(folder: Path) -> World:
    """Answers are chosen among _ANSWERS by what the base and the adapters make of them."""
    base = pico.write_base(folder / "base.gguf")
    bank = fill_bank(folder, base)
    prompts = [f"is {s} {p} {i}?" for i, (s, p) in enumerate(subjects_and_places(32))]
    with open_model(base, ONE_THREAD) as model:
        gains = gains_of_adapters(model, prompts, [r.path for r in open_bank(bank).records()])
    good = [_ANSWERS[i] for i in gains[int(HELPER[-1])].argmax(axis=1)]
    bad = [_ANSWERS[i] for i in gains.mean(axis=0).argmin(axis=1)]
    split = split_examples([_example(prompt, line) for line, prompt in enumerate(prompts)])
    support, untouched = ({e.line for e in part} for part in (split.support, split.untouched))
    return World(
        base,
        bank,
        write_lines(folder / "helped.jsonl", prompts, good),
        write_lines(folder / "hopeless.jsonl", prompts,
                    [good[i] if i in support else bad[i] for i in range(32)]),
        write_lines(folder / "deceptive.jsonl", prompts,
                    [bad[i] if i in untouched else good[i] for i in range(32)]),
        write_lines(folder / "unanswered.jsonl", prompts),
    )  # fmt: skip


def gains_of_adapters(model: Model, prompts: Sequence[str], paths: Sequence[Path]) -> np.ndarray:
    """Nats by which each adapter makes each answer to each prompt likelier, (k, n, answers)."""
    asked = [_example(p, 0, answer) for p in prompts for answer in _ANSWERS]
    examples = tokenise_examples(model, model_template(model), asked)
    losses = []
    with open_context(model) as context:
        for path in (None, *paths):
            context.apply([] if path is None else [WeightedAdapter(path)])
            losses.append([s.nll for s in score(context, examples)])
    base, *alone = np.reshape(losses, (1 + len(paths), len(prompts), len(_ANSWERS)))
    return base - np.array(alone)


def _example(prompt: str, line: int, completion: str | None = None) -> Example:
    return Example((Message("user", prompt),), completion, (), line)


def subjects_and_places(n: int) -> list[tuple[str, str]]:
    return [(_SUBJECTS[i % len(_SUBJECTS)], _PLACES[i % len(_PLACES)]) for i in range(n)]


def fill_bank(folder: Path, base: Path, n_layers: int = 0) -> Path:
    """N_ADAPTERS random adapters, each with a signature of a few lines of its own."""
    dims = replace(pico.Dims(), n_layer=read_base(base).n_layer)
    bank, requests = open_bank(folder / "bank", create=True), []
    for i in range(N_ADAPTERS):
        peft = pico.write_peft(folder / f"adapter{i}", seed=i, size=1.0, dims=dims)
        lines = [f"{s} {p}" for s, p in subjects_and_places(6 + i)]
        data = write_lines(folder / f"data{i}.jsonl", lines, [f"yes {i}"] * len(lines))
        facts = Facts(licence="MIT", template="chat")
        requests.append(Request(peft, f"adapter{i}", data, facts))
    with open_embedder(base, n_layers=n_layers, n_threads=1) as embed:
        add_many(bank, read_base(base), requests, embed=embed)
    return bank.path


def write_lines(path: Path, prompts: Sequence[str], completions: Sequence[str] = ()) -> Path:
    """A JSONL dataset, without completions if none are given."""
    records = [{"prompt": prompt} for prompt in prompts]
    for record, completion in zip(records, completions, strict=False):
        record["completion"] = completion
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
