"""The listening socket: opened first, so that a busy port is told before a model is loaded."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from edgelora.errors import EdgeLoRAError
from edgelora.serve.settings import Settings

_BACKLOG = 256


@contextlib.contextmanager
def open_socket(settings: Settings) -> Iterator[socket.socket]:
    """Listen at the host and port of the settings for the block.

    Raises:
        EdgeLoRAError: the address is taken, unknown or not permitted.
    """
    host, port = settings.host.strip("[]"), settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _refused(settings, error) from error
    with listening:
        try:
            if os.name != "nt":  # on Windows it would let two servers share one port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError as error:
            raise _refused(settings, error) from error
        yield listening


def url_of(listening: socket.socket) -> str:
    """The URL at which the socket is reached from this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refused(settings: Settings, error: OSError) -> EdgeLoRAError:
    return EdgeLoRAError(
        f"cannot listen at {settings.host} port {settings.port}: {error.strerror or error}",
        hint="Choose another --port (0 takes a free one) or --host.",
    )
