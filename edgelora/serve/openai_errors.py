"""Errors as OpenAI's clients expect them: one body, one status for each kind, no tracebacks."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgelora.errors import (
    AlreadyExists,
    EdgeLoRAError,
    InvalidGrammar,
    NotFound,
    TemplateError,
)
from edgelora.operators.routing import Uncalibrated
from edgelora.serve.jobs import ContextOverflow, Draining, QueueFull, QueueTimeout
from edgelora.serve.served import InvalidAdapterSet, InvalidName, ModelNotFound
from edgelora.serve.server import NotReady

logger = logging.getLogger("edgelora.serve")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_WHERE = ("body", "query", "path", "header", "cookie")


class ErrorDetail(BaseModel):
    """What OpenAI's clients read of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error.

    Args:
        type: OpenAI's word for the kind; by default what belongs to the status.
        param: the field at fault.
        code: what a program compares with.
        retry_after_s: becomes the header Retry-After, in whole seconds from 1.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON of the answer; also what a stream that has begun ends with."""
        detail = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": detail}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to this error."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def response(self) -> Response:
        """The whole answer. ASCII: a text quoted from a request may hold half a surrogate pair."""
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, self.headers, media_type="application/json")


class EarlyError(HTTPException):
    """An ApiError raised while FastAPI reads a body: it lets HTTPExceptions through, and makes
    400 of everything else."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message)
        self.error = error


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that can never be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after_s: float = 1.0) -> ApiError:
    """The server cannot answer now."""
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for a route that may answer these errors, and those all may answer."""
    return {
        status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
        for status in sorted({400, 401, 403, 413, 500, 503, *statuses})
    }


def to_api_error(error: BaseException) -> ApiError:
    """What a client is told of an exception; details of unexpected ones go to the log only."""
    if isinstance(error, ApiError):
        return error
    for kind in type(error).__mro__:
        if kind in _KINDS:
            return _KINDS[kind](error)
    logger.error("an unexpected error in a request", exc_info=error)
    return ApiError(500, "The server failed on this request; its log says why.", code="internal")


def install(app: FastAPI) -> None:
    """Turn every exception of `app`'s routes into an OpenAI error."""

    async def on_any(_request: Request, error: Exception) -> Response:
        return to_api_error(error).response()

    async def on_invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = _from_http(error, f"{request.method} {request.url.path}").response()
        answer.headers.update(error.headers or {})
        if error.status_code == 405:
            answer.headers["Allow"] = _allowed(app, request.scope)
        return answer

    app.add_exception_handler(ApiError, on_any)
    app.add_exception_handler(EdgeLoRAError, on_any)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_middleware(Failsafe)


class Failsafe:
    """ASGI: what no handler took is a 500 with OpenAI's body, told once to the log.

    In an answer that has begun nothing can be said any more: the connection is closed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await to_api_error(error).response()(scope, receive, send)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """pydantic's problems as one 400: the first names `param`, the message has them all."""
    problems = [f"{_field(error)}: {error['msg']}".removeprefix(": ") for error in errors]
    shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
    return bad_request("; ".join(shown), param=_field(errors[0]) or None if errors else None)


def _from_http(error: HTTPException, asked: str) -> ApiError:
    if isinstance(error, EarlyError):
        return error.error
    if error.status_code in (404, 405):
        return ApiError(error.status_code, f"Invalid URL or method ({asked})", code="unknown_url")
    return ApiError(error.status_code, str(error.detail))


def _allowed(app: FastAPI, scope: Scope) -> str:
    """Every method that a path takes; Starlette names those of one route, and each has its own."""

    def takes(method: str) -> bool:
        asked = {**scope, "method": method}
        return any(route.matches(asked)[0] is Match.FULL for route in app.routes)

    return ", ".join(filter(takes, _METHODS))


def _field(error: Mapping[str, Any]) -> str:
    """`messages[0].content` of pydantic's ("body", "messages", 0, "content")."""
    place = list(error["loc"])
    if place and place[0] in _WHERE:
        place = place[1:]
    if error["type"] == "json_invalid":
        return ""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _from_edgelora(error: EdgeLoRAError) -> ApiError:
    logger.error("a request failed: %s", error, exc_info=error)
    return ApiError(500, error.what, code="engine_error")


def _from_overflow(error: ContextOverflow) -> ApiError:
    # OpenAI's own words: clients look for them, and for the code.
    return bad_request(
        f"This model's maximum context length is {error.n_ctx} tokens. However, you requested "
        f"{error.n_prompt + error.max_tokens} tokens ({error.n_prompt} in the prompt, "
        f"{error.max_tokens} in the completion). Please reduce the length of either.",
        code="context_length_exceeded",
    )


def _from_full_queue(error: QueueFull) -> ApiError:
    return ApiError(
        429,
        "Too many requests are waiting. Try again later.",
        code="rate_limit_exceeded",
        retry_after_s=error.retry_after_s,
    )


_KINDS: dict[type, Callable[[Any], ApiError]] = {
    ContextOverflow: _from_overflow,
    QueueFull: _from_full_queue,
    QueueTimeout: lambda error: unavailable(error.what, "queue_timeout"),
    NotReady: lambda error: unavailable(error.what, "not_ready"),
    Draining: lambda error: unavailable(error.what, "draining"),
    ModelNotFound: lambda error: ApiError(404, error.what, param="model", code="model_not_found"),
    InvalidAdapterSet: lambda error: bad_request(error.what, "lora"),
    InvalidName: lambda error: bad_request(str(error), "name"),
    InvalidGrammar: lambda error: bad_request(str(error), "grammar", "invalid_grammar"),
    Uncalibrated: lambda error: bad_request(str(error), "model", "auto_unavailable"),
    TemplateError: lambda error: bad_request(str(error), "messages", "template_error"),
    NotFound: lambda error: ApiError(404, str(error), code="not_found"),
    AlreadyExists: lambda error: ApiError(409, str(error), code="already_exists"),
    EdgeLoRAError: _from_edgelora,
}
