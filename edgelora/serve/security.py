"""Who may use the server and how much they may send: checks before any route, as ASGI."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterator
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgelora.serve.openai_errors import ApiError, EarlyError, unavailable
from edgelora.serve.server import Server
from edgelora.serve.settings import is_loopback

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Answered without a key, whatever the server's state.
OPEN_PATHS = frozenset({"/health", "/ready"})
_ALWAYS = OPEN_PATHS | {"/metrics", "/openapi.json"}


class Guard:
    """Refuses what must not reach a route.

    - a Host header that is not this machine's, where only this machine is served: a page of
      another site whose name was made to mean 127.0.0.1 (DNS rebinding);
    - a request that another site's page makes a browser send, where no key is asked for;
    - a missing or wrong API key;
    - a body past the limit, by its length or while it is read;
    - anything but /health, /ready and the page while the model cannot answer.

    Args:
        open_paths: need no key (the page; /health and /ready never do).
    """

    def __init__(self, app: ASGIApp, server: Server, open_paths: Collection[str] = ()) -> None:
        self._app = app
        self._server = server
        self._settings = server.settings
        self._pages = frozenset(open_paths)
        self._keys = tuple(key.encode() for key in server.settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = next(self._problems(scope), None)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        limit = self._settings.limits.max_body_bytes
        await self._app(scope, _limited(receive, limit), send)

    def _problems(self, scope: Scope) -> Iterator[ApiError]:
        headers = dict(scope["headers"])
        yield from self._host(headers.get(b"host", b""))
        yield from self._origin(scope["method"], headers)
        path = scope["path"]
        if path not in OPEN_PATHS | self._pages:
            yield from self._key(headers.get(b"authorization", b""))
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._settings.limits.max_body_bytes:
            yield too_large(self._settings.limits.max_body_bytes)
        if path not in _ALWAYS | self._pages:
            yield from state_problems(self._server)

    def _host(self, host: bytes) -> Iterator[ApiError]:
        if not self._settings.is_loopback or not host:
            return
        name = host.decode("latin-1").rpartition("]")[0] or host.decode("latin-1").split(":")[0]
        if not is_loopback(name):
            yield ApiError(
                403,
                "This server answers this machine only, and not under this name.",
                code="host_not_allowed",
            )

    def _origin(self, method: str, headers: dict[bytes, bytes]) -> Iterator[ApiError]:
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or method in _SAFE_METHODS or self._keys:
            return
        allowed = self._settings.cors_origins
        same = urlsplit(origin).netloc == headers.get(b"host", b"").decode("latin-1")
        if not same and origin not in allowed and "*" not in allowed:
            yield ApiError(
                403,
                "Pages of other sites may not use this server (see --cors-origin).",
                code="origin_not_allowed",
            )

    def _key(self, authorization: bytes) -> Iterator[ApiError]:
        if not self._keys:
            return
        scheme, _, given = authorization.partition(b" ")
        # Every key is compared, so that the time tells nothing about which one was near.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            problem = "Incorrect API key provided." if given else "No API key provided."
            yield ApiError(
                401, f"{problem} Send it as 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )


def state_problems(server: Server) -> Iterator[ApiError]:
    """Why the model cannot answer now, if it cannot."""
    state = server.state
    if state == "failed":
        yield unavailable("The engine has failed; the server is ending.", "engine_failed", 5.0)
    elif state == "draining":
        yield unavailable("The server is ending and takes no new requests.", "draining", 5.0)
    elif state == "loading":
        yield unavailable("The model is still being loaded.", "not_ready")


def too_large(limit: int) -> ApiError:
    """The answer to a body past the limit."""
    return ApiError(413, f"The body is larger than {limit:,} bytes.", code="body_too_large")


def _limited(receive: Receive, limit: int) -> Receive:
    n_bytes = 0

    async def counted() -> Message:
        nonlocal n_bytes
        message = await receive()
        n_bytes += len(message.get("body", b""))
        if n_bytes > limit:
            raise EarlyError(too_large(limit))
        return message

    return counted
