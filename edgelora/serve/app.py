"""The HTTP application: every router, the guard in front of them, and the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from edgelora import __version__
from edgelora.serve import (
    admin,
    chat,
    completions,
    embeddings,
    openai_errors,
    pages,
    responses,
)
from edgelora.serve.security import Guard
from edgelora.serve.server import Server

_ROUTERS = (
    admin.router, chat.router, completions.router, responses.router, embeddings.router
)  # fmt: skip
_ABOUT = "OpenAI's API for a base model and LoRA adapters on a CPU; each adapter is a model id."
# FastAPI can report requests to a collector that the environment names; a local server does not.
_SILENT: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def create_app(server: Server) -> FastAPI:
    """The application over a server, which may still be loading: it answers 503 until then."""
    app = FastAPI(
        title="EdgeLoRA",
        version=__version__,
        description=_ABOUT,
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        telemetry=_SILENT,
    )
    app.state.server = server
    openai_errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    found = pages.read_pages()
    pages.add_pages(app, found)
    app.add_middleware(Guard, server=server, open_paths=found)
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-EdgeLoRA-Adapter", "Retry-After"],
        )
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document without 422, which no route answers: problems of a body are 400."""
    document = FastAPI.openapi(app)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
    return document
