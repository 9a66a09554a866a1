"""Options that several commands share, and what they open with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgelora.cli import console

if TYPE_CHECKING:
    from edgelora.datasets.records import Dataset
    from edgelora.datasets.template import Template
    from edgelora.engine.model import Model

Command = TypeVar("Command", bound=Callable[..., Any])
TYPES = ("f16", "f32", "bf16", "q8_0")

base_option = click.option(
    "--base", required=True, help="A GGUF file, or the name of a base (see `edgelora doctor`)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
low_ram_option = click.option(
    "--low-ram/--no-low-ram",
    default=None,
    help="Less memory, slower: weights stay memory-mapped, contexts are small "
    "(default: if free RAM is under 1.5 times the base).",
)
embed_option = click.option(
    "--embed",
    "n_embedded",
    type=click.IntRange(min=0),
    default=0,
    help="Examples of a dataset to embed; 0: 64, or as many as three minutes allow.",
)
force_option = click.option("--force", is_flag=True, help="Overwrite an existing output.")
type_option = click.option(
    "--type",
    "dtype",
    type=click.Choice(TYPES),
    default="f16",
    show_default=True,
    help="Of the tensors.",
)


def data_options(command: Command, *, required: bool = True) -> Command:
    """--data, --prompt-key and --completion-key (`data`, `prompt_key`, `completion_key`)."""
    for option in (
        click.option("--completion-key", help="Column of the dataset's completions."),
        click.option("--prompt-key", help="Column of the dataset's prompts."),
        click.option(
            "--data",
            required=required,
            type=click.Path(path_type=Path),
            help="Dataset: JSONL, CSV ...",
        ),
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """--base, --template and --low-ram (`base`, `template`, `low_ram`: None lets memory decide)."""
    for option in (
        low_ram_option,
        click.option("--template", help="Prompt template to use (default: the base's own)."),
        base_option,
    ):
        command = option(command)
    return command


def _to_rank(_ctx: click.Context, _param: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a whole number from 1 nor auto.")
    return int(value)


def to_layers(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """`--layers`: a number of layers, 0 for `all`, None where it is not given."""
    if value is None or value == "all":
        return None if value is None else 0
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a whole number from 1 nor all.")
    return int(value)


def combine_options(command: Command) -> Command:
    """--combine, --rank and --type (`combine`, `rank`, `dtype`)."""
    for option in (
        type_option,
        click.option(
            "--rank",
            metavar="N|auto",
            callback=_to_rank,
            default="auto",
            show_default=True,
            help="Of the result, for svd: a number, or auto (99 % of the energy, at most 64).",
        ),
        click.option(
            "--combine",
            type=click.Choice(["svd", "cat", "linear"]),
            default="svd",
            show_default=True,
            help="svd: best approximation of a rank; cat: exact; linear: average of the factors.",
        ),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def open_engine(base: str | Path, threads: int, low_ram: bool | None) -> Iterator[Model]:
    """Open the base that `--base` names for the block."""
    from edgelora.bases import resolve
    from edgelora.engine.model import ModelOptions, open_model

    with open_model(resolve(base), ModelOptions(n_threads=threads, low_ram=low_ram)) as model:
        for warning in model.warnings:
            console.warn(console.safe(warning))
        yield model


def load_dataset(
    path: Path,
    prompt_key: str | None = None,
    completion_key: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Read a dataset, and say on stderr which format it is in and what was left out."""
    from edgelora.datasets.read import read_dataset

    dataset = read_dataset(path, prompt_key=prompt_key, completion_key=completion_key, limit=limit)
    console.say(console.safe(f"{path}: {len(dataset.examples)} examples ({dataset.format})"))
    for warning in dataset.warnings:
        console.warn(console.safe(f"{path}: {warning}"))
    return dataset


def check_templates(template_key: str, adapters: Sequence[Path]) -> None:
    """Warn of each adapter that records another prompt template than the one in use.

    Raises:
        NotFound, InvalidFile: a path that is not a sound GGUF LoRA.
    """
    from edgelora.adapters.gguf_lora import open_lora

    for path in adapters:
        recorded = open_lora(path).metadata.get("edgelora.template")
        if recorded is None:
            console.say(console.safe(f"{path}: records no prompt template to compare with"))
        elif recorded != template_key:
            console.warn(
                console.safe(
                    f"{path}: trained with another prompt template ({_short(str(recorded))}) "
                    f"than the one in use ({_short(template_key)}); it may help less"
                )
            )


def show_template_warnings(template: Template, seen: set[str]) -> None:
    """Print what the template has to say, each warning once; `seen` is updated."""
    for warning in template.warnings:
        if warning not in seen:
            seen.add(warning)
            console.warn(console.safe(warning))


def _short(template: str) -> str:
    if template == "chat":
        return "the base's chat template"
    text = " ".join(template.split())
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
