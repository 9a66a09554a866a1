"""`edgelora doctor --measure`: which type of weights is fast here, and with how many threads."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgelora.cli import console

if TYPE_CHECKING:
    from edgelora.engine.measure import Measured


def measure_base(base: str, n_threads: int, as_json: bool) -> None:
    """Measure, print, and keep the choice of threads if none was given."""
    import psutil

    from edgelora.bases import resolve
    from edgelora.engine.machine import cpu_model
    from edgelora.engine.measure import TYPES, measure_types
    from edgelora.engine.native import version
    from edgelora.engine.threads import store_threads

    if base == "":
        raise click.UsageError("--measure needs a GGUF file or the name of a base.")
    path, ram_bytes = resolve(base), psutil.virtual_memory().total
    with console.stages() as advance:
        measured = measure_types(
            path,
            types=TYPES,
            n_threads=n_threads,
            progress=lambda file_type, done: advance("measuring types", done, len(TYPES)),
        )
    kept = None if n_threads else store_threads(measured.architecture, measured.threads)
    if as_json:
        machine = {"cpu": cpu_model(), "cores": psutil.cpu_count(logical=False)}
        facts = {"base": path.name, "llama_cpp_python": version(), "kept": kept and str(kept)}
        fastest = measured.fastest(ram_bytes).file_type
        console.show_json({**machine, **facts, **asdict(measured), "fastest": fastest})
        return
    _show(path.name, measured, ram_bytes)
    if kept is not None:
        console.say(console.safe(f"threads are kept in {kept}; --threads overrides them"))


def _show(name: str, measured: Measured, ram_bytes: int) -> None:
    part = ""
    if measured.n_measured < measured.n_layer:
        part = f", from {measured.n_measured} of its {measured.n_layer} layers"
    console.show(console.safe(f"{name}, tokens a second{part}:"))
    titles = ("type", "GB", "prompt", "answer")
    rows = [
        (t.file_type, f"{t.size_bytes / 1e9:.2f}", f"{t.prompt:.1f}", f"{t.decode:.1f}")
        for t in measured.types
    ]
    console.show_columns([titles, *rows])
    for file_type, reason in measured.left_out.items():
        console.warn(console.safe(f"{file_type} is left out: {reason}"))
    threads = measured.threads
    console.show(f"threads: {threads.prompt} for prompts, {threads.decode} for answers")
    best = measured.fastest(ram_bytes)
    console.show(
        f"fetch {best.file_type.upper()} for this machine: a prompt of 512 tokens and an answer of "
        f"128 take {best.seconds():.3g} s"
    )
