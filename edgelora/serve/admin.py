"""Routes beside generation: models, adapters, tokens, health and metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from edgelora.errors import EdgeLoRAError, EngineError
from edgelora.serve import monitoring
from edgelora.serve.openai_errors import ApiError, ErrorBody, bad_request, responses
from edgelora.serve.schema import encodable
from edgelora.serve.security import state_problems
from edgelora.serve.served import ModelNotFound, Registry, Served
from edgelora.serve.server import Server

router = APIRouter()
# An adapter leaves memory when the requests that use it have ended; so long a DELETE waits.
_UNLOAD_WAIT_S = 10.0


def current_server(request: Request) -> Server:
    """The server that the application was made for."""
    server: Server = request.app.state.server
    return server


Current = Annotated[Server, Depends(current_server)]


class Model(BaseModel):
    """One model, as OpenAI's clients list it, with what is known of it here."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "edgelora"
    edgelora: dict[str, Any]


class ModelList(BaseModel):
    """Every id that `model` may be."""

    object: str = "list"
    data: list[Model]


class Adapter(BaseModel):
    """One adapter: whether it is in memory, and what its file says."""

    id: str
    object: str = "adapter"
    created: int
    loaded: bool
    in_bank: bool


class AdapterList(BaseModel):
    """Every adapter that is known."""

    object: str = "list"
    data: list[Adapter]


class NewAdapter(BaseModel):
    """A file of the adapter folder."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str = Field(min_length=1, max_length=1024, description="Inside the adapter folder.")
    name: str | None = Field(
        default=None, min_length=1, max_length=200, description="Its id; the file's stem if null."
    )


class Deleted(BaseModel):
    """An adapter that was taken away; `in_memory` while requests that began before still use it."""

    id: str
    object: str = "adapter"
    deleted: bool = True
    in_memory: bool


class Content(BaseModel):
    """A text; control strings in it are text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    content: Annotated[str, AfterValidator(encodable)]
    add_special: bool = Field(default=False, description="Begin with BOS, where the base has it.")


class Tokens(BaseModel):
    """Token ids of the base's vocabulary."""

    model_config = ConfigDict(extra="forbid")

    tokens: list[Annotated[int, Field(ge=0, strict=True)]]


class Text(BaseModel):
    """The text of token ids; control tokens give nothing."""

    content: str


class Health(BaseModel):
    """The state of the server: loading, ready or draining."""

    status: str


def _unhealthy(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in (403, *statuses)}


@router.get("/health", response_model=Health, responses=_unhealthy(503), tags=["state"])
async def health(server: Current) -> Health:
    """200 while the process and its engine live, whether or not the model can answer yet."""
    if server.state == "failed":
        raise next(state_problems(server))
    return Health(status=server.state)


@router.get("/ready", response_model=Health, responses=_unhealthy(503), tags=["state"])
async def ready(server: Current) -> Health:
    """200 once the model can answer, 503 before and when the server is ending."""
    for problem in state_problems(server):
        raise problem
    return Health(status=server.state)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=_unhealthy(401, 500),
    tags=["state"],
)
async def metrics(server: Current) -> Response:
    """Counters for Prometheus; llama-server's names where the meaning is the same."""
    content, media_type = monitoring.render(server)
    return Response(content, headers={"Content-Type": media_type})


@router.get("/v1/models", response_model=ModelList, responses=responses(), tags=["models"])
async def list_models(server: Current) -> ModelList:
    """The base and every adapter."""
    registry = server.registry
    return ModelList(data=[_model(server, registry.get(name), {}) for name in registry.ids()])


@router.get(
    "/v1/models/{model_id:path}", response_model=Model, responses=responses(404), tags=["models"]
)
def get_model(model_id: str, server: Current) -> Model:
    """One model, with what its file tells: ranks, template, sources and coefficients."""
    served = server.registry.get(model_id)
    try:
        more = {**served.facts, "provenance": served.provenance}
    except EdgeLoRAError as error:
        more = {"problem": error.what}
    return _model(server, served, more)


@router.get("/v1/adapters", response_model=AdapterList, responses=responses(), tags=["adapters"])
async def list_adapters(server: Current) -> AdapterList:
    """Every adapter, in memory or not."""
    registry = server.registry
    return AdapterList(data=[_adapter(registry, served) for served in registry.adapters()])


@router.post(
    "/v1/adapters",
    response_model=Adapter,
    status_code=201,
    responses=responses(404, 409),
    tags=["adapters"],
)
async def add_adapter(new: NewAdapter, server: Current) -> Adapter:
    """Load a file of the adapter folder; it is a model id from then on."""
    registry = server.registry
    path = await run_in_threadpool(_find, server.settings.folder, new.path)
    try:
        served = await run_in_threadpool(registry.add, path, new.name)
        await asyncio.wrap_future(registry.load(served.id))
    except (ModelNotFound, OSError) as error:
        raise ApiError(409, f"{new.path!r} was removed meanwhile", param="path") from error
    except EdgeLoRAError as error:
        raise _as_client_error(error, server.settings.folder) from error
    return _adapter(registry, served)


@router.delete(
    "/v1/adapters/{name:path}", response_model=Deleted, responses=responses(404), tags=["adapters"]
)
async def remove_adapter(name: str, server: Current) -> Deleted:
    """Take an adapter out of memory; the id of one that is not in the bank is unknown then."""
    leaving = asyncio.wrap_future(server.registry.remove(name))
    await asyncio.wait({leaving}, timeout=_UNLOAD_WAIT_S)
    if leaving.done():
        leaving.result()
    return Deleted(id=name, in_memory=not leaving.done())


@router.post("/tokenize", response_model=Tokens, responses=responses(), tags=["tokens"])
def tokenize(text: Content, server: Current) -> Tokens:
    """Token ids of a text."""
    vocabulary = server.model.vocabulary
    try:
        ids = vocabulary.tokenize(text.content)
    except EngineError as error:
        raise bad_request(error.what, "content") from error
    if text.add_special and vocabulary.adds_bos and vocabulary.bos >= 0:
        ids.insert(0, vocabulary.bos)
    return Tokens(tokens=ids)


@router.post("/detokenize", response_model=Text, responses=responses(), tags=["tokens"])
def detokenize(tokens: Tokens, server: Current) -> Text:
    """The text of token ids; bytes that are no whole character become U+FFFD."""
    vocabulary = server.model.vocabulary
    for i, token in enumerate(tokens.tokens):
        if token >= vocabulary.n_tokens:
            raise bad_request(
                f"token {token} is not in the vocabulary of {vocabulary.n_tokens}", f"tokens[{i}]"
            )
    return Text(content=vocabulary.decode(tokens.tokens).decode("utf-8", "replace"))


def _model(server: Server, served: Served, more: dict[str, Any]) -> Model:
    limits = server.scheduler.limits
    facts = {"kind": "base" if served.path is None else "adapter", "n_ctx": limits.n_ctx}
    if served.path is None:
        facts |= {"name": server.model.base.name, "architecture": server.model.base.architecture}
    else:
        facts |= {"base": server.registry.base_id, "loaded": server.registry.is_loaded(served.id)}
    return Model(id=served.id, created=served.created, edgelora=facts | more)


def _adapter(registry: Registry, served: Served) -> Adapter:
    return Adapter(
        id=served.id,
        created=served.created,
        loaded=registry.is_loaded(served.id),
        in_bank=served.in_bank,
    )


def _find(folder: Path | None, given: str) -> Path:
    """The file that a request names, inside the folder whatever links and `..` it holds."""
    if folder is None:
        raise bad_request("This server was started without a folder of adapters.", "path")
    try:
        root = folder.resolve()
        path = (root / given).resolve()
        if not path.is_relative_to(root):
            raise bad_request("The path leads out of the folder of adapters.", "path")
        if path.is_file():
            return path
    except (OSError, ValueError) as error:  # a NUL, half a surrogate pair, a name too long
        raise bad_request("Not a path.", "path") from error
    raise ApiError(404, f"No file {given!r} in the folder of adapters.", param="path")


def _as_client_error(error: EdgeLoRAError, folder: Path | None) -> Exception:
    """A file that cannot be served is the request's fault; where it lies is nobody's business."""
    from edgelora.errors import IncompatibleAdapter, InvalidFile, UnsupportedFile

    if not isinstance(error, InvalidFile | UnsupportedFile | IncompatibleAdapter | EngineError):
        return error
    text = str(error) if folder is None else str(error).replace(f"{folder.resolve()}/", "")
    return bad_request(text, "path", "invalid_adapter")
