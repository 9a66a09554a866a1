"""`edgelora serve`: an OpenAI-compatible server for the base and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import console
from edgelora.cli.options import model_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgelora.serve.settings import Settings

_KV_TYPES = ("f16", "q8_0", "q4_0", "f32")


def _models(command: Callable[..., Any]) -> Callable[..., Any]:
    """--adapter, --bank, --load-all, --max-loaded and --adapter-dir."""
    for option in (
        click.option(
            "--adapter-dir",
            "adapter_folder",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            help="Folder that POST /v1/adapters may load from (default: the bank's, if any).",
        ),
        click.option(
            "--max-loaded",
            type=click.IntRange(min=1),
            default=32,
            show_default=True,
            help="Adapters in memory; past it the longest unused one of the bank leaves.",
        ),
        click.option(
            "--load-all", is_flag=True, help="Load the whole bank at the start, and keep it loaded."
        ),
        click.option(
            "--bank",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            help="A bank: each adapter is a model, loaded when it is first asked for.",
        ),
        click.option(
            "--adapter",
            "adapters",
            multiple=True,
            type=click.Path(path_type=Path),
            help="A GGUF LoRA, or a name in --bank, loaded at the start; repeatable.",
        ),
    ):
        command = option(command)
    return command


def _memory(command: Callable[..., Any]) -> Callable[..., Any]:
    """--slots, --context, --kv-type, --mlock and --prefix-cache."""
    for option in (
        click.option(
            "--prefix-cache",
            "cache_mb",
            metavar="MB",
            type=click.IntRange(min=0),
            default=256,
            show_default=True,
            help="Memory for the beginnings of finished requests, so that they are not read again.",
        ),
        click.option("--mlock", is_flag=True, help="Lock the weights in RAM."),
        click.option(
            "--kv-type",
            type=click.Choice(_KV_TYPES),
            default="f16",
            show_default=True,
            help="Of keys and values: smaller types take less memory; f32 varies least.",
        ),
        click.option(
            "--context",
            "n_ctx",
            type=click.IntRange(min=0),
            default=0,
            help="Tokens of one request, prompt and answer; 0: 4096, or what fits the free RAM.",
        ),
        click.option(
            "--slots",
            "n_slots",
            type=click.IntRange(min=0, max=128),
            default=0,
            help="Requests computed at once; 0: 4, or what fits the free RAM.",
        ),
    ):
        command = option(command)
    return command


def _queue(command: Callable[..., Any]) -> Callable[..., Any]:
    """--max-queue and --queue-timeout."""
    for option in (
        click.option(
            "--queue-timeout",
            "queue_timeout_s",
            type=click.FloatRange(min=0.1),
            default=120.0,
            show_default=True,
            help="Seconds that a request may wait for a slot (then 503).",
        ),
        click.option(
            "--max-queue",
            type=click.IntRange(min=0),
            default=64,
            show_default=True,
            help="Requests that may wait for a slot; one more gets 429.",
        ),
    ):
        command = option(command)
    return command


def _network(command: Callable[..., Any]) -> Callable[..., Any]:
    """--host, --port, --api-key-file, --cors-origin and --drain-timeout."""
    for option in (
        click.option(
            "--drain-timeout",
            "drain_s",
            type=click.FloatRange(min=0),
            default=30.0,
            show_default=True,
            help="Seconds that running requests have when the server is told to end.",
        ),
        click.option(
            "--cors-origin",
            "cors_origins",
            multiple=True,
            help="Origin of another site's pages that may use the server; '*': any. Repeatable.",
        ),
        click.option(
            "--api-key-file",
            type=click.Path(path_type=Path),
            help="Keys, one a line, of which a request must bring one (or: EDGELORA_API_KEY).",
        ),
        click.option(
            "--port",
            type=click.IntRange(min=0, max=65535),
            default=8080,
            show_default=True,
            help="0 takes a free one.",
        ),
        click.option(
            "--host",
            default="127.0.0.1",
            show_default=True,
            help="Address to listen at; 0.0.0.0 is open to the network.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@model_options
@_models
@_network
@_memory
@_queue
@console.common_options
@console.tells_memory
def command(**options: Any) -> None:
    """Serve the base and adapters over HTTP, as OpenAI's API; the page at / talks to it.

    Each adapter is a model id beside the base. Ctrl-C (or SIGTERM) lets running requests finish; a
    second one ends at once.
    """
    from edgelora.serve.server import open_server
    from edgelora.serve.sockets import open_socket

    settings = _settings(**options)
    _show_errors()
    _warn_if_open(settings)
    with open_socket(settings) as listening, open_server(settings, say=_say, warn=_warn) as server:
        # The model is being loaded in another thread while this one imports what HTTP needs.
        from edgelora.serve.lifecycle import run

        run(server, listening, say=_say)


def _settings(
    base: str,
    low_ram: bool | None,
    threads: int,
    api_key_file: Path | None,
    drain_s: float,
    cache_mb: int,
    seed: int,
    **others: Any,
) -> Settings:
    from edgelora.bases import resolve
    from edgelora.serve.settings import Settings, Timeouts, read_api_keys

    if seed:
        _warn("--seed has no effect here: each request has its own")
    path = resolve(base)
    return Settings(
        base=path,
        base_id=path.stem if Path(base).expanduser() == path else base.lower(),
        low_ram=low_ram,
        n_threads=threads,
        api_keys=read_api_keys(api_key_file),
        cache_bytes=cache_mb * 1_000_000,
        timeouts=Timeouts(drain_s=drain_s),
        **others,
    )


def _warn_if_open(settings: Settings) -> None:
    if not settings.is_loopback and not settings.api_keys:
        _warn(
            f"{settings.host} can be reached from the network, and no API key is asked for "
            "(--api-key-file, or EDGELORA_API_KEY)"
        )


def _show_errors() -> None:
    """What goes wrong in a request is told on stderr, with -v off too."""
    import logging

    for name in ("edgelora.serve", "uvicorn.error", "asyncio"):
        log = logging.getLogger(name)
        log.setLevel(min(log.getEffectiveLevel(), logging.ERROR))


def _say(line: str) -> None:
    console.say(console.safe(line))


def _warn(line: str) -> None:
    console.warn(console.safe(line))
