"""The terminal: results to stdout, progress and messages to stderr, errors to exit codes."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgelora.errors import EdgeLoRAError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
Command = TypeVar("Command", bound=Callable[..., Any])


@contextlib.contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields a function that advances it. Nothing is drawn with -q."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=err.quiet,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


def warn(message: str) -> None:
    """One warning on stderr; shown with -q too, for nothing is silent."""
    quiet, err.quiet = err.quiet, False
    err.print(f"[yellow]warning:[/yellow] {message}", soft_wrap=True)
    err.quiet = quiet


def say(message: str) -> None:
    """One line on stderr, absent with -q."""
    err.print(message, soft_wrap=True)


def common_options(command: Command) -> Command:
    """--threads, --seed, -v and -q, the same on every command."""

    @click.option("--threads", type=click.IntRange(min=0), default=0, help="0: physical cores.")
    @click.option("--seed", type=int, default=0, show_default=True, help="For all that is drawn.")
    @click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log and tracebacks.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress, only results and warnings.")
    @functools.wraps(command)
    def wrapper(*args: Any, verbose: bool, quiet: bool, **kwargs: Any) -> Any:
        err.quiet = quiet
        logging.basicConfig(
            level=logging.DEBUG if verbose else logging.CRITICAL,
            format="%(message)s",
            handlers=[RichHandler(console=err, show_path=False)],
            force=True,
        )
        return with_exit_codes(command, verbose)(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


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
            err.print(str(error), markup=False, soft_wrap=True)
            raise SystemExit(error.exit_code) from error
        except KeyboardInterrupt as error:
            err.quiet = False
            err.print("interrupted; nothing half-written was left behind")
            raise SystemExit(130) from error

    return wrapper
