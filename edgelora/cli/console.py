"""The terminal: results to stdout, progress and messages to stderr, errors to exit codes."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from edgelora.cli.interrupts import no_interrupt_lost
from edgelora.errors import EdgeLoRAError, NoImprovement
from edgelora.hub.offline import offline as offline_if

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
Command = TypeVar("Command", bound=Callable[..., Any])
_drawn: list[Progress] = []
_PEAK = "edgelora.peak"
_ROOM = "Make room on the disk, then run the same command again."
_MAY_NOT = "Choose a folder that you may write to, or change its permissions."
_WHAT_TO_DO = {
    errno.ENOSPC: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _MAY_NOT,
    errno.EPERM: _MAY_NOT,
    errno.EROFS: _MAY_NOT,
}


def _bar(*counts: ProgressColumn, transient: bool) -> Progress:
    """Bars on stderr that say `counts`; `transient` ones vanish when they are done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeRemainingColumn(),
        console=err,
        transient=transient,
        disable=err.quiet or not err.is_terminal,
    )


@contextlib.contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields a function that advances it. Nothing is drawn with -q."""
    bar = _bar(MofNCompleteColumn(), transient=True)
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


def clean(text: str) -> str:
    """Text of a file, without what a terminal would obey."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def safe(text: str) -> str:
    """Text of a file, cleaned, that rich takes as it is: for `say`, `warn` and table cells."""
    return escape(clean(text))


def show(line: str) -> None:
    """One line of a result on stdout, cleaned; never wrapped, for a script may read it."""
    out.print(clean(line), markup=False, soft_wrap=True)


def show_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Lines whose cells stand below each other; columns in `right` are right-aligned.

    Nothing is cut to the terminal's width, as rich's tables do: names stay whole.
    """
    cleaned = [[clean(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cleaned, strict=True)]
    for row in cleaned:
        cells = zip(row, widths, strict=True)
        padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(cells))
        show("  ".join(padded).rstrip())


def show_json(value: object) -> None:
    """A result as JSON on stdout: ASCII, with null for what JSON has no number for."""
    click.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: object) -> object:
    """`value` with None for each NaN and infinity, such as the interval of a single example."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of a long job; yields a function (stage, steps done, steps in all)."""
    bar = _bar(MofNCompleteColumn(), transient=False)
    tasks: dict[str, TaskID] = {}

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)

    with bar:
        _drawn.append(bar)
        try:
            yield advance
        finally:
            _drawn.remove(bar)


@contextlib.contextmanager
def transfers() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for the file that comes now; yields a function (what it is, bytes so far, in all).

    With 0 bytes in all it only says what is done.
    """
    bar = _bar(DownloadColumn(), TransferSpeedColumn(), transient=True)
    task = bar.add_task("", total=None)
    shown = ""

    def advance(what: str, done: int, total: int) -> None:
        nonlocal shown
        if what != shown:  # begun anew, so that the speed is that of this file
            shown = what
            bar.reset(task, description=safe(what), total=total or None, completed=done)
        bar.update(task, completed=done)

    with bar:
        yield advance


def confirm(question: str) -> bool:
    """A person's yes or no, the bars stopped meanwhile; no where nobody is at a terminal."""
    if not (err.is_terminal and sys.stdin.isatty()):
        return False
    for bar in _drawn:
        bar.stop()
    try:
        return click.confirm(clean(question), default=True, err=True)
    except click.Abort:
        return False
    finally:
        for bar in _drawn:
            bar.start()


def warn(message: str) -> None:
    """One warning on stderr; shown with -q too, for nothing is silent."""
    quiet, err.quiet = err.quiet, False
    err.print(f"[yellow]warning:[/yellow] {message}", soft_wrap=True)
    err.quiet = quiet


def say(message: str) -> None:
    """One line on stderr, absent with -q."""
    err.print(message, soft_wrap=True)


def common_options(command: Command) -> Command:
    """--threads, --seed, --offline, -v and -q, the same on every command."""

    @click.option("--threads", type=click.IntRange(min=0), default=0, help="0: physical cores.")
    @click.option("--seed", type=int, default=0, show_default=True, help="For all that is drawn.")
    @click.option("--offline", is_flag=True, help="Refuse every connection to another machine.")
    @click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log and tracebacks.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress, only results and warnings.")
    @functools.wraps(command)
    def wrapper(*args: Any, offline: bool, verbose: bool, quiet: bool, **kwargs: Any) -> Any:
        err.quiet = quiet
        _tolerate_narrow_encodings()
        logging.basicConfig(
            level=logging.DEBUG if verbose else logging.CRITICAL,
            format="%(message)s",
            handlers=[RichHandler(console=err, show_path=False)],
            force=True,
        )
        with offline_if(offline), no_interrupt_lost():
            return with_exit_codes(command, verbose)(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def tells_memory(command: Command) -> Command:
    """The command ends with its peak memory on stderr: below `common_options`, whose -q it heeds.

    An error ends it without, unless it came after all the work.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        from edgelora.memory import sampled_peak

        with sampled_peak() as peak:
            click.get_current_context().meta[_PEAK] = peak
            try:
                command(*args, **kwargs)
            except (SystemExit, NoImprovement):
                say(f"peak memory: {peak.read()}")
                raise
            say(f"peak memory: {peak.read()}")

    return wrapper  # type: ignore[return-value]


def peak_memory() -> dict[str, object]:
    """The peak so far of the command that runs, which `tells_memory`, as JSON has it."""
    return asdict(click.get_current_context().meta[_PEAK].read())


def with_exit_codes(command: Callable[..., Any], verbose: bool = False) -> Callable[..., Any]:
    """Errors of the library become one message and their exit code; Ctrl-C becomes 130."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except EdgeLoRAError as error:
            if verbose:
                err.print_exception()
            err.quiet = False
            err.print("[red]error:[/red]", end=" ")
            err.print(clean(str(error)), markup=False, soft_wrap=True)
            raise SystemExit(error.exit_code) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # `edgelora ... | head`: click ends quietly
                raise
            if verbose:
                err.print_exception()
            err.quiet = False
            err.print("[red]error:[/red]", safe(str(error)), soft_wrap=True)
            if error.errno in _WHAT_TO_DO:
                err.print(_WHAT_TO_DO[error.errno])
            raise SystemExit(1) from error
        except KeyboardInterrupt as error:
            err.quiet = False
            err.print("interrupted; nothing half-written was left behind")
            raise SystemExit(130) from error

    return wrapper


def _tolerate_narrow_encodings() -> None:
    """A character that the terminal or a Windows pipe cannot encode becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
