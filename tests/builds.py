"""To build from: a pico base, a bank of random adapters, and answers under one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pico

from edgelora.adapters.base import read_base
from edgelora.bank import Facts, open_bank
from edgelora.bank.adding import Request, add_many
from edgelora.bank.embedding import open_embedder
from edgelora.datasets.records import Message
from edgelora.engine.context import open_context
from edgelora.engine.generate import stream
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template

ONE_THREAD = ModelOptions(n_threads=1)
N_ADAPTERS = 4
HELPER = "adapter1"
_SUBJECTS = "the cat|a dog|this man|that bird|his word|the boat|her hat|a tree".split("|")
_PLACES = "in the house|on the hill|with them|from this|at the end|for you".split("|")


@dataclass(frozen=True)
class World:
    """Paths of a base and a bank for it, and of datasets that are answered in several ways."""

    base: Path
    bank: Path
    helped: Path
    base_own: Path
    unanswered: Path


def make_world(folder: Path, *, n: int = 32) -> World:
    """n prompts, answered greedily by one adapter (strongly applied) and by the base alone."""
    base = pico.write_base(folder / "base.gguf")
    bank = fill_bank(folder, base)
    prompts = [f"is {s} {p} {i}?" for i, (s, p) in enumerate(_pairs(n))]
    with open_model(base, ONE_THREAD) as model:
        helped = answer(model, prompts, [WeightedAdapter(open_bank(bank).record(HELPER).path)])
        own = answer(model, prompts, [])
    return World(
        base,
        bank,
        write_lines(folder / "helped.jsonl", prompts, helped),
        write_lines(folder / "base_own.jsonl", prompts, own),
        write_lines(folder / "unanswered.jsonl", prompts),
    )


def _pairs(n: int) -> list[tuple[str, str]]:
    return [(_SUBJECTS[i % len(_SUBJECTS)], _PLACES[i % len(_PLACES)]) for i in range(n)]


def fill_bank(folder: Path, base: Path) -> Path:
    """N_ADAPTERS random adapters, each with a signature of a few lines of its own."""
    bank, requests = open_bank(folder / "bank", create=True), []
    for i in range(N_ADAPTERS):
        peft = pico.write_peft(folder / f"adapter{i}", seed=i, size=1.0)
        lines = [f"{s} {p}" for s, p in _pairs(6 + i)]
        data = write_lines(folder / f"data{i}.jsonl", lines, [f"yes {i}"] * len(lines))
        facts = Facts(licence="MIT", template="chat")
        requests.append(Request(peft, f"adapter{i}", data, facts))
    with open_embedder(base, n_threads=1) as embed:
        add_many(bank, read_base(base), requests, embed=embed)
    return bank.path


def answer(model: Model, prompts: Sequence[str], adapters: Sequence[WeightedAdapter]) -> list[str]:
    """Greedy answers of 6 tokens."""
    template = model_template(model)
    answers = []
    with open_context(model) as context:
        context.apply(adapters)
        for prompt in prompts:
            segments = template.render([Message("user", prompt)])
            ids = model.vocabulary.tokenize_segments(segments)
            text = "".join(stream(context, ids, max_tokens=6))
            answers.append("".join(c for c in text if c.isascii()).strip() or "no")
    return answers


def write_lines(path: Path, prompts: Sequence[str], completions: Sequence[str] = ()) -> Path:
    """A JSONL dataset, without completions if none are given."""
    records = [{"prompt": prompt} for prompt in prompts]
    for record, completion in zip(records, completions, strict=False):
        record["completion"] = completion
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
