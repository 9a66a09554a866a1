"""`edgelora cache`: what the cache of embeddings holds, and how to empty it."""

from __future__ import annotations

from typing import Any

import click

from edgelora.cli import console
from edgelora.cli.options import json_option


@click.group()
def command() -> None:
    """List or clear the cache of embeddings: vectors of your texts, and no text."""


@command.command()
@json_option
@console.common_options
def ls(as_json: bool, **_: Any) -> None:
    """List what the cache holds for each base."""
    from edgelora.embedding_cache import DEFAULT_CAP_BYTES, cache_folder, open_cache

    with open_cache() as cache:
        entries = cache.entries()
    if as_json:
        console.show_json(
            {
                "folder": str(cache_folder()),
                "cap_bytes": DEFAULT_CAP_BYTES,
                "entries": [vars(entry) for entry in entries],
            }
        )
        return
    rows = [("base", "embeddings", "MB")]
    rows += [(e.model, str(e.n_embeddings), f"{e.size_bytes / 1e6:.1f}") for e in entries]
    console.show_columns(rows, right=(1, 2))
    used = sum(entry.size_bytes for entry in entries) / 1e6
    cap = DEFAULT_CAP_BYTES / 1e6
    console.say(console.safe(f"{cache_folder()}: {used:.1f} MB of at most {cap:.0f} MB"))


@command.command()
@json_option
@console.common_options
def clear(as_json: bool, **_: Any) -> None:
    """Delete every embedding and give the space back."""
    from edgelora.embedding_cache import cache_folder, open_cache

    with open_cache() as cache:
        n_embeddings = cache.clear()
    if as_json:
        console.show_json({"folder": str(cache_folder()), "n_cleared": n_embeddings})
    else:
        console.show(f"{n_embeddings} embeddings cleared")
