"""`edgelora cache`: what the cache of embeddings, means, kernels and builds holds; empties it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import console
from edgelora.cli.options import json_option

if TYPE_CHECKING:
    from edgelora.build.kept import Shelf


@click.group()
def command() -> None:
    """List or clear the cache: vectors of your texts, and no text; means of banks."""


@command.command()
@json_option
@console.common_options
def ls(as_json: bool, **_: Any) -> None:
    """List what the cache holds for each base, and what else it keeps of banks."""
    from edgelora.embedding_cache import DEFAULT_CAP_BYTES, cache_folder, open_cache

    with open_cache() as cache:
        entries = cache.entries()
    shelves = _shelves()
    sizes = {shelf.name: [file.size_bytes for file in shelf.files()] for shelf, _ in shelves}
    if as_json:
        console.show_json(
            {
                "folder": str(cache_folder()),
                "cap_bytes": DEFAULT_CAP_BYTES,
                "entries": [vars(entry) for entry in entries],
                **{
                    shelf.name: {
                        "n": len(sizes[shelf.name]),
                        "size_bytes": sum(sizes[shelf.name]),
                        "cap_bytes": shelf.cap_bytes,
                    }
                    for shelf, _ in shelves
                },
            }
        )
        return
    rows = [("base", "embeddings", "MB")]
    rows += [(e.model, str(e.n_embeddings), f"{e.size_bytes / 1e6:.1f}") for e in entries]
    console.show_columns(rows, right=(1, 2))
    used = sum(entry.size_bytes for entry in entries) / 1e6
    cap = DEFAULT_CAP_BYTES / 1e6
    console.say(console.safe(f"{cache_folder()}: {used:.1f} MB of at most {cap:.0f} MB"))
    for shelf, title in shelves:
        console.say(
            f"{title}: {len(sizes[shelf.name])}, {sum(sizes[shelf.name]) / 1e6:.1f} MB of at most "
            f"{shelf.cap_bytes / 1e6:.0f} MB"
        )


@command.command()
@json_option
@console.common_options
def clear(as_json: bool, **_: Any) -> None:
    """Delete every embedding, mean and end of a build, and give the space back.

    Also which products are fastest here: a build tries it out again. Threads that were measured
    stay.
    """
    from edgelora.embedding_cache import cache_folder, open_cache
    from edgelora.gradient.kernels import FINDINGS

    with open_cache() as cache:
        n_embeddings = cache.clear()
    n_means, n_kernels, n_builds = (shelf.clear() for shelf, _ in _shelves())
    n_products = FINDINGS.forget()
    if as_json:
        console.show_json(
            {
                "folder": str(cache_folder()),
                "n_cleared": n_embeddings,
                "n_means_cleared": n_means,
                "n_kernels_cleared": n_kernels,
                "n_builds_cleared": n_builds,
                "n_products_cleared": n_products,
            }
        )
    else:
        console.show(
            f"cleared: {n_embeddings} embeddings, {n_means} means, {n_kernels} kernels of banks, "
            f"{n_builds} ends of builds, {n_products} choices of products"
        )


def _shelves() -> list[tuple[Shelf, str]]:
    """What is kept beside embeddings, and what it is called."""
    from edgelora.build.earlier import BUILDS
    from edgelora.build.grams import KERNELS
    from edgelora.build.means import MEANS

    return [
        (MEANS, "uniform means of adapters"),
        (KERNELS, "kernels of banks"),
        (BUILDS, "ends of builds"),
    ]
