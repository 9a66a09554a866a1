"""Write the model card of a bank: each adapter's data, licence, training and measured loss.

usage: python scripts/make_model_card.py BANK TASKS LOG [--recipe recipe.json] [-o BANK/README.md]

BANK   the folder of the bank; every .gguf below it is one adapter, named as its task
TASKS  <task>/task.json with source, category and licence (lists), as scripts/train_bank.py reads it
LOG    bank.log of scripts/train_bank.py; recipe.json is expected beside it

Stops, with all names, when an adapter has no task.json or no line in the log: a card is whole or
is not written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.files import write_atomic

LINE = re.compile(r"^(\S+) loss ([0-9.]+) -> ([0-9.]+)")
TRAIN_COMMAND = "python scripts/train_bank.py BASE TASKS OUT"


@dataclass(frozen=True)
class Row:
    """One adapter of the card; losses in nats for each completion token on held-out lines."""

    name: str
    size_bytes: int
    source: str
    category: str
    licence: str
    loss_base: float
    loss_own: float


def main() -> None:
    """Read, check, write."""
    arguments = _arguments()
    recipe_path = arguments.recipe or arguments.log.with_name("recipe.json")
    recipe = json.loads(recipe_path.read_text(encoding="utf-8"))
    rows = read_rows(arguments.bank, arguments.tasks, arguments.log)
    target = arguments.output or arguments.bank / "README.md"
    write_atomic(target, card(rows, recipe).encode())
    print(f"{target}: {len(rows)} adapters")


def read_rows(bank: Path, tasks: Path, log: Path) -> list[Row]:
    """What is known of every adapter of the bank, in order of name."""
    losses = {m[1]: (float(m[2]), float(m[3])) for m in map(LINE.match, _lines(log)) if m}
    adapters = sorted(bank.rglob("*.gguf"), key=lambda path: path.stem)
    problems = [f"{path.stem}: no line in {log}" for path in adapters if path.stem not in losses]
    rows = []
    for path in adapters:
        description = tasks / path.stem / "task.json"
        if not description.is_file():
            problems.append(f"{path.stem}: no {description}")
        elif path.stem in losses:
            facts = json.loads(description.read_text(encoding="utf-8"))
            known = (", ".join(facts[key]) for key in ("source", "category", "licence"))
            rows.append(Row(path.stem, path.stat().st_size, *known, *losses[path.stem]))
    if problems or not rows:
        sys.exit("\n".join(problems) or f"{bank}: no adapter (.gguf) in it")
    return rows


def card(rows: list[Row], recipe: dict[str, Any]) -> str:
    """The whole card as Markdown."""
    return "\n".join([_head(rows, recipe), *map(_line, rows), _foot(rows, recipe)])


def _head(rows: list[Row], recipe: dict[str, Any]) -> str:
    megabytes = sum(row.size_bytes for row in rows) / 1e6
    return f"""# A bank of {len(rows)} LoRA adapters for {recipe["base"]}

{len(rows)} adapters, {megabytes:.1f} MB, one for each natural-language task below, as GGUF files
that llama.cpp loads beside the base. They are the material that `edgelora build` combines; alone,
each does its own task and nothing else.

Loss: mean negative log-likelihood in nats of a completion token (end token included) on
{recipe["n_test"]} held-out lines of the task, in torch on the dequantised base: the base alone,
then with the adapter.

| adapter | data | category | licence of the data | MB | loss: base | with adapter |
| --- | --- | --- | --- | ---: | ---: | ---: |"""


def _line(row: Row) -> str:
    numbers = f"{row.size_bytes / 1e6:.2f} | {row.loss_base:.2f} | {row.loss_own:.2f}"
    return f"| {row.name} | {row.source} | {row.category} | {row.licence} | {numbers} |"


def _foot(rows: list[Row], recipe: dict[str, Any]) -> str:
    licences = Counter(row.licence for row in rows).most_common()
    counted = ", ".join(f"{licence} ({count})" for licence, count in licences)
    return f"""
## Training

{_recipe_text(recipe)}
The script is `scripts/train_bank.py` (`{TRAIN_COMMAND}`); each task has its own
random initialisation, seeded by its name. Then `edgelora bank add` converted the PEFT folders and
computed the signatures with the quantised base.

`neural.safetensors`, if it is there, holds the paper's Neural head, trained for this bank by
`scripts/train_neural.py`; `edgelora build --operator neural` uses it.

## Data and licences

The tasks are from Super-NaturalInstructions v2 (Wang et al., 2022, "Super-NaturalInstructions:
Generalization via Declarative Instructions on 1600+ NLP Tasks"), built on the data sets in the
column "data"; thanks and credit to their authors. Only tasks whose instances allow it were used:
{counted}.
The text of the tasks is not in this repository; the adapters hold weights only. They are offered
under Apache-2.0, as the base is, with attribution to the data sets above; every file carries the
licence of its data (`edgelora show FILE`), and what is combined from several lists them all.

## What they are not for

Small adapters of a small model, trained for minutes: material for experiments and the demo, not
for decisions about people. They repeat the errors and biases of their data. English only.
"""


def _recipe_text(recipe: dict[str, Any]) -> str:
    precision = "bfloat16 autocast" if recipe["bf16"] else "float32"
    modules = ", ".join(recipe["modules"])
    return f"""LoRA of rank {recipe["rank"]}, alpha {recipe["alpha"]} on {modules};
{recipe["steps"]} steps of {recipe["batch"]} examples, AdamW, learning rate {recipe["lr"]}
with warm-up and linear decay, {precision}, loss on the completion and its end token only,
prompts in the base's chat template, lines over {recipe["max_tokens"]} tokens left out."""


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bank", type=Path, help="folder of the bank")
    parser.add_argument("tasks", type=Path, help="folder with <task>/task.json")
    parser.add_argument("log", type=Path, help="bank.log of scripts/train_bank.py")
    parser.add_argument("--recipe", type=Path, help="default: recipe.json beside the log")
    parser.add_argument("-o", "--output", type=Path, help="default: README.md of the bank")
    return parser.parse_args()


if __name__ == "__main__":
    main()
