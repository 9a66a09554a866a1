"""Offline, and held to it: connections to other machines are refused at Python's own sockets."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import sys
from collections.abc import Iterator

from edgelora.errors import HubError, HubUnreachable

VARIABLE = "EDGELORA_OFFLINE"
VARIABLES = (VARIABLE, "HF_HUB_OFFLINE")
_TRUE = ("1", "on", "yes", "true")
# Events that CPython raises before it does what they name, and which argument says with whom.
_SPEAKS = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1}
_ASKS = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}
_hooks: list[str] = []


def is_offline() -> bool:
    """Whether EDGELORA_OFFLINE or HF_HUB_OFFLINE says so (1, on, yes or true)."""
    return any(os.environ.get(name, "").lower() in _TRUE for name in VARIABLES)


def require_network(what: str) -> None:
    """Refuse what cannot be done offline, before anything is tried.

    Raises:
        HubUnreachable: this is offline.
    """
    if is_offline():
        raise HubUnreachable(
            f"{what} needs the network, and this is offline",
            hint=f"Run it without --offline and without {' and '.join(VARIABLES)} set, or use what "
            "is on this machine: `edgelora pull base --local`, `edgelora bank ls`.",
        )


@contextlib.contextmanager
def offline(chosen: bool = True) -> Iterator[None]:
    """Offline for the block if `chosen`, or if the environment says so already.

    Meanwhile a connection to another machine, and a look-up of its name, raise HubError: not by
    good conduct of each caller, but by an audit hook of the interpreter. Sockets of this machine
    (loopback, Unix) stay open, for a server has them. What is NOT covered: native code that makes
    its own system calls, child processes that do not read the variables, and the look-up of a name
    that is given to socket.connect() itself, which CPython does before it asks.
    """
    before = os.environ.get(VARIABLE)
    if chosen:
        os.environ[VARIABLE] = "1"
    if is_offline() and not _hooks:
        sys.addaudithook(_refuse)  # for the life of the process; it asks is_offline() each time
        _hooks.append("installed")
    try:
        yield
    finally:
        if chosen and before is None:
            os.environ.pop(VARIABLE, None)
        elif chosen and before is not None:
            os.environ[VARIABLE] = before


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event in _SPEAKS and is_offline():
        address = arguments[_SPEAKS[event]]
        # What is no pair of host and port is a Unix socket, or a socket that is connected already.
        if isinstance(address, tuple) and not _is_here(_text(address[0])):
            raise _refusal(_text(address[0]))
    elif event in _ASKS and is_offline():
        host = _text(arguments[_ASKS[event]])
        if not _is_here(host) and not (_is_number(host) and event != "socket.gethostbyaddr"):
            raise _refusal(host)


def _refusal(host: str) -> HubError:
    return HubError(f"{host}: a connection to it was tried, and this is offline")


def _text(host: object) -> str:
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host or "")
    return text.partition("%")[0].lower()


def _is_number(host: str) -> bool:
    """Whether a host is an address already, so that looking it up asks nobody."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_here(host: str) -> bool:
    if _is_number(host):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return host in ("", "localhost")
