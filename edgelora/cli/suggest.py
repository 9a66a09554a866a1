"""`edgelora suggest`: the public adapters whose data is most like a dataset, named offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import console
from edgelora.cli.options import data_options, json_option, load_dataset

if TYPE_CHECKING:
    from edgelora.suggest import Nearest, Suggestions


@click.command()
@data_options
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Adapters to name."
)
@json_option
@console.common_options
def command(
    data: Path,
    prompt_key: str | None,
    completion_key: str | None,
    top: int,
    as_json: bool,
    seed: int,
    **_: Any,
) -> None:
    """Name the public adapters whose data is most like yours.

    Compares the tokens of instruction, prompts and completions with those of the tasks that
    adapters for Mistral-7B-Instruct-v0.2 were trained on. Nothing is downloaded or sent.
    """
    from edgelora.suggest import suggest

    dataset = load_dataset(data, prompt_key, completion_key)
    found = suggest(dataset.examples, top=top, seed=seed)
    _say_what_was_compared(found, len(dataset.examples))
    if as_json:
        console.show_json(_as_json(found))
    else:
        _show(found)


def _say_what_was_compared(found: Suggestions, n_examples: int) -> None:
    if found.n_counted < n_examples:
        console.say(f"counted: {found.n_counted} of the {n_examples} examples, drawn by --seed")
    tokens = ", ".join(f"{name} {n:,}" for name, n in found.n_tokens.items())
    console.say(f"tokens: {tokens}")
    absent = [name for name, n in found.n_tokens.items() if not n]
    if absent:
        console.warn(f"not compared, for the dataset has none: {' and '.join(absent)}")
    if not any(any(one.similarity.values()) for one in found.nearest):
        console.warn("no token in common with any task of the catalogue: the order means nothing")


def _show(found: Suggestions) -> None:
    from edgelora.cli.charts import coefficients_chart
    from edgelora.suggest.catalogue import BASE

    names = [one.entry.task for one in found.nearest]
    console.show(
        f"nearest of {found.n_ranked} adapters for {BASE}, in standard deviations above their mean:"
    )
    console.out.print(coefficients_chart(names, [one.score for one in found.nearest]))
    fields = list(found.nearest[0].similarity)
    rows = [("adapter", *fields, "category", "source", "licence of its data")]
    rows += [_cells(one) for one in found.nearest]
    console.show_columns(rows, right=range(1, 1 + len(fields)))
    console.show(_sizes(len(found.nearest)))
    if found.left_out:
        console.show(
            f"left out: {len(found.left_out)} adapters of the catalogue whose data was not counted "
            "(--json names them)"
        )


def _cells(one: Nearest) -> tuple[str, ...]:
    entry = one.entry
    texts = (entry.category, entry.source, entry.licence)
    return (
        entry.adapter,
        *(f"{value:.2f}" for value in one.similarity.values()),
        *(", ".join(values) or "not recorded" for values in texts),
    )


def _sizes(n: int) -> str:
    from edgelora.suggest.catalogue import CONVERTED_BYTES, DOWNLOAD_BYTES

    one, kept = DOWNLOAD_BYTES / 1e6, CONVERTED_BYTES / 1e6
    return (
        f"download {one:.1f} MB each ({n * one:,.0f} MB for {n}), "
        f"{kept:.1f} MB once converted ({n * kept:,.0f} MB)"
    )


def _as_json(found: Suggestions) -> dict[str, object]:
    from edgelora.suggest.catalogue import BASE, CONVERTED_BYTES, DOWNLOAD_BYTES
    from edgelora.suggest.similarity import WEIGHTS

    adapters: Sequence[dict[str, object]] = [
        {
            **vars(one.entry),
            "score": one.score,
            "similarity": dict(one.similarity),
            "download_bytes": DOWNLOAD_BYTES,
            "converted_bytes": CONVERTED_BYTES,
        }
        for one in found.nearest
    ]
    return {
        "base": BASE,
        "weights": dict(WEIGHTS),
        "n_ranked": found.n_ranked,
        "n_counted": found.n_counted,
        "n_tokens": dict(found.n_tokens),
        "adapters": adapters,
        "left_out": [entry.adapter for entry in found.left_out],
    }
