"""The application around generation: models, adapters, tokens, health, errors and the guard."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pico
import pytest
from fastapi import FastAPI
from serving import Running, running, running_server, settings_of

from edgelora.errors import AlreadyExists, EdgeLoRAError, NotFound
from edgelora.serve.app import create_app
from edgelora.serve.openai_errors import ApiError, to_api_error
from edgelora.serve.pages import FOLDER, read_pages
from edgelora.serve.server import Server
from edgelora.serve.settings import RequestLimits

PROVENANCE = {"sources": [{"name": "x", "coefficient": 0.5}], "operator": "uniform"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, a folder with a third one, and one for another base."""
    folder = tmp_path_factory.mktemp("serve")
    base = pico.write_base(folder / "base.gguf")
    said = {"edgelora.provenance": json.dumps(PROVENANCE), "edgelora.template": "chat"}
    pico.write_random_lora(folder / "a.gguf", base, seed=1, metadata=said)
    pico.write_random_lora(folder / "b.gguf", base, seed=2)
    (folder / "more").mkdir()
    pico.write_random_lora(folder / "more" / "c.gguf", base, seed=3)
    (folder / "more" / "text.gguf").write_text("not a GGUF")
    other = pico.write_base(folder / "other.gguf", dims=pico.Dims(n_embd=64, n_head=8))
    pico.write_random_lora(folder / "more" / "other.gguf", other)
    (folder / "more" / "out.gguf").symlink_to(folder / "b.gguf")
    return folder


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[Running]:
    adapters = [files / "a.gguf", files / "b.gguf"]
    with running(files / "base.gguf", adapters, adapter_folder=files / "more") as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


def error_of(reply: httpx.Response) -> dict[str, str]:
    """The error of a reply, which has OpenAI's four fields and nothing else."""
    error = reply.json()["error"]
    assert reply.json().keys() == {"error"} and list(error) == ["message", "type", "param", "code"]
    assert "Traceback" not in reply.text
    return error


def test_models_are_the_base_and_each_adapter(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["base", "a", "b"]
    assert all(model["object"] == "model" and model["created"] > 0 for model in listed["data"])
    assert client.get("/v1/models/base").json()["edgelora"]["kind"] == "base"


def test_a_model_tells_how_it_was_made(client: httpx.Client) -> None:
    told = client.get("/v1/models/a").json()["edgelora"]
    assert told["provenance"] == PROVENANCE
    assert (told["kind"], told["ranks"], told["template"]) == ("adapter", [4, 4], "chat")
    assert told["loaded"] is True
    assert "problem" not in told and str(Path.cwd()) not in json.dumps(told)


def test_an_unknown_model_is_404_and_the_known_ones_are_listed(client: httpx.Client) -> None:
    reply = client.get("/v1/models/no/such")
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'no/such'" in error["message"] and "base, a, b" in error["message"]


def test_an_adapter_of_the_folder_comes_and_goes(client: httpx.Client) -> None:
    reply = client.post("/v1/adapters", json={"path": "c.gguf", "name": "team/c"})
    assert reply.status_code == 201 and reply.json()["loaded"] is True
    assert client.get("/v1/models/team/c").status_code == 200
    assert "team/c" in [adapter["id"] for adapter in client.get("/v1/adapters").json()["data"]]
    # The same again changes nothing; its name belongs to it.
    again = client.post("/v1/adapters", json={"path": "c.gguf", "name": "team/c"})
    assert again.status_code == 201
    gone = client.delete("/v1/adapters/team/c")
    assert gone.json() == {
        "id": "team/c", "object": "adapter", "deleted": True, "in_memory": False,
    }  # fmt: skip
    assert client.get("/v1/models/team/c").status_code == 404
    assert client.delete("/v1/adapters/team/c").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"path": "../a.gguf"}, 400, None),
        ({"path": "/etc/passwd"}, 400, None),
        ({"path": "out.gguf"}, 400, None),  # a link that leads out
        ({"path": "."}, 404, None),
        ({"path": "none.gguf"}, 404, None),
        ({"path": "a\0b"}, 400, None),
        ({"path": "x" * 1000}, 400, None),
        ({"path": "text.gguf"}, 400, "invalid_adapter"),
        ({"path": "other.gguf"}, 400, "invalid_adapter"),
        ({"path": "c.gguf", "name": "a"}, 409, "already_exists"),
        ({"path": "c.gguf", "name": "base"}, 409, "already_exists"),
        ({"path": "c.gguf", "name": "auto"}, 409, "already_exists"),
        ({"path": "c.gguf", "name": "bad\nname"}, 400, None),
        ({"path": "c.gguf", "nmae": "c"}, 400, None),
        ({}, 400, None),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    client: httpx.Client, files: Path, body: dict[str, str], status: int, code: str | None
) -> None:
    before = client.get("/v1/adapters").json()
    reply = client.post("/v1/adapters", json=body)
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (status, code)
    assert str(files) not in error["message"]
    assert client.get("/v1/adapters").json() == before


def test_the_base_is_no_adapter(client: httpx.Client) -> None:
    assert client.delete("/v1/adapters/base").status_code == 404


def test_tokenize_takes_control_strings_for_text(client: httpx.Client, server: Running) -> None:
    text = "the and <|im_end|>"
    tokens = client.post("/tokenize", json={"content": text}).json()["tokens"]
    vocabulary = server.server.model.vocabulary
    assert tokens == vocabulary.tokenize(text)
    assert vocabulary.control_ids["<|im_end|>"] not in tokens
    with_bos = client.post("/tokenize", json={"content": text, "add_special": True}).json()
    assert with_bos["tokens"] == [vocabulary.bos, *tokens]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["content"].strip() == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/detokenize", {"tokens": [1, 10**9]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "add_special": 0}, "add_special"),
        ("/tokenize", [], None),
    ],
)
def test_a_wrong_field_is_named(
    client: httpx.Client, path: str, body: object, param: str | None
) -> None:
    reply = client.post(path, json=body)
    assert (reply.status_code, error_of(reply)["param"]) == (400, param)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"content":"\\ud800"}', b"[" * 100_000])
def test_what_is_no_json_is_400(client: httpx.Client, content: bytes) -> None:
    reply = client.post("/tokenize", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and error_of(reply)["type"] == "invalid_request_error"


def test_unknown_urls_and_methods_are_openai_errors(client: httpx.Client) -> None:
    unknown, wrong = client.get("/v1/nothing"), client.put("/v1/models")
    assert (unknown.status_code, wrong.status_code) == (404, 405)
    assert "GET /v1/nothing" in error_of(unknown)["message"]
    assert error_of(wrong)["code"] == "unknown_url" and wrong.headers["allow"] == "GET"
    several = {path: client.put(path).headers["allow"] for path in ("/v1/adapters", "/")}
    assert several == {"/v1/adapters": "GET, POST", "/": "GET, HEAD"}  # by routes of their own


def test_the_document_names_every_status_and_no_422(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert "422" not in json.dumps(document) and "HTTPValidationError" not in json.dumps(document)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"200", "201"} & operation["responses"].keys()
            expected = {"403", "503"} if path in ("/health", "/ready") else {"401", "403"}
            assert expected <= operation["responses"].keys(), path


def test_metrics_have_llama_servers_names(client: httpx.Client) -> None:
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    values = dict(re.findall(r"^([a-z_:]+(?:\{[^}]*\})?) (\S+)$", reply.text, re.MULTILINE))
    for name in (
        "prompt_tokens_total", "prompt_seconds_total", "tokens_predicted_total",
        "tokens_predicted_seconds_total", "n_decode_total", "requests_processing",
        "requests_deferred", "kv_cache_usage_ratio",
    ):  # fmt: skip
        assert float(values[f"llamacpp:{name}"]) >= 0
    assert float(values["edgelora_slots"]) == 2 and float(values["edgelora_ready"]) == 1
    assert float(values["edgelora_rss_anonymous_bytes"]) > 1e6
    assert 'edgelora_requests_asked_total{model="a"}' in values


def test_the_page_is_fenced_in_and_cached(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.text == (FOLDER / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    known = client.get("/", headers={"if-none-match": page.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")
    types = {path: page.media_type for path, page in read_pages().items()}
    assert types["/app.js"] == "text/javascript" and types["/style.css"] == "text/css"
    assert client.get("/style.css").headers["content-type"].startswith("text/css")
    assert client.head("/").status_code == 200


def test_a_package_without_its_page_says_so(tmp_path: Path) -> None:
    with pytest.raises(EdgeLoRAError, match=r"index\.html: missing"):
        read_pages(tmp_path)


# --- who may use it, and how much they may send


def test_rebound_names_are_refused_on_loopback(client: httpx.Client) -> None:
    for host in ("localhost:8080", "127.0.0.1", "[::1]:8080", "app.localhost"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[fe80::1]"):
        reply = client.get("/health", headers={"host": host})
        assert (reply.status_code, error_of(reply)["code"]) == (403, "host_not_allowed")


def test_pages_of_other_sites_cannot_send(client: httpx.Client, server: Running) -> None:
    send = {"content": "x"}
    foreign = client.post("/tokenize", json=send, headers={"origin": "https://evil.example"})
    assert (foreign.status_code, error_of(foreign)["code"]) == (403, "origin_not_allowed")
    assert client.post("/tokenize", json=send, headers={"origin": "null"}).status_code == 403
    own = client.post("/tokenize", json=send, headers={"origin": server.url})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers


def test_bodies_past_the_limit_are_413(files: Path) -> None:
    limits = RequestLimits(max_body_bytes=1000)
    with running_server(files / "base.gguf", limits=limits) as url:
        whole = httpx.post(f"{url}/tokenize", json={"content": "x" * 1000})
        chunked = httpx.post(f"{url}/tokenize", content=iter([b"x" * 600] * 2))
        for reply in (whole, chunked):
            assert (reply.status_code, error_of(reply)["code"]) == (413, "body_too_large")
        assert httpx.post(f"{url}/tokenize", json={"content": "x" * 900}).status_code == 200


def test_keys_and_origins(files: Path) -> None:
    with running_server(
        files / "base.gguf", api_keys=("one", "two"), cors_origins=("https://friend.example",)
    ) as url:
        for path in ("/health", "/ready", "/", "/app.js"):
            assert httpx.get(url + path).status_code == 200, path
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            reply = httpx.get(url + path)
            assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key"), path
            assert reply.headers["www-authenticate"] == "Bearer"
        for value, status in (
            ("Bearer one", 200), ("bearer two", 200), ("Bearer three", 401), ("one", 401),
            ("Basic one", 401), ("Bearer one two", 401),
        ):  # fmt: skip
            reply = httpx.get(f"{url}/v1/models", headers={"authorization": value})
            assert reply.status_code == status, value
        origin = {"origin": "https://friend.example"}
        allowed = httpx.options(
            f"{url}/v1/models", headers=origin | {"access-control-request-method": "POST"}
        )
        assert allowed.headers["access-control-allow-origin"] == origin["origin"]
        refused = httpx.get(f"{url}/v1/models", headers=origin)
        assert refused.headers["access-control-allow-origin"] == origin["origin"]
        strange = httpx.get(f"{url}/v1/models", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in strange.headers


# --- before it is ready, when it ends, and when it fails


def test_the_port_answers_while_the_model_is_loaded(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load = threading.Event()
    opened = Server._open

    def open_later(self: Server) -> None:
        may_load.wait(20)
        opened(self)

    monkeypatch.setattr(Server, "_open", open_later)
    with running(files / "base.gguf", wait=False) as started:
        assert httpx.get(f"{started.url}/health").json() == {"status": "loading"}
        assert httpx.get(f"{started.url}/").status_code == 200
        assert "edgelora_ready 0.0" in httpx.get(f"{started.url}/metrics").text
        for path in ("/ready", "/v1/models", "/v1/models/base"):
            reply = httpx.get(started.url + path)
            assert (reply.status_code, error_of(reply)["code"]) == (503, "not_ready")
            assert int(reply.headers["retry-after"]) >= 1
        may_load.set()
        started.server.wait(30)
        assert httpx.get(f"{started.url}/ready").json() == {"status": "ready"}


def test_a_draining_server_refuses_and_a_failed_one_is_red(files: Path) -> None:
    with running(files / "base.gguf") as started:
        assert started.server.drain(10)
        reply = httpx.get(f"{started.url}/v1/models")
        assert (reply.status_code, error_of(reply)["code"]) == (503, "draining")
        assert httpx.get(f"{started.url}/health").json() == {"status": "draining"}
        assert httpx.get(f"{started.url}/ready").status_code == 503
        started.server.failure = RuntimeError("gone")
        for path in ("/health", "/ready", "/v1/models"):
            reply = httpx.get(started.url + path)
            assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_failed")
        assert "gone" not in reply.text


def test_a_base_that_does_not_open_is_said(files: Path) -> None:
    server = Server(settings_of(files / "none.gguf"))
    server.start()
    with pytest.raises(EdgeLoRAError, match="none.gguf"):
        server.wait(20)
    assert server.state == "failed"
    server.close()


def test_unexpected_errors_say_nothing_of_themselves() -> None:
    told = to_api_error(KeyError("secret"))
    assert told.status == 500 and "secret" not in json.dumps(told.body())
    assert to_api_error(NotFound("x: not there")).status == 404
    assert to_api_error(AlreadyExists("x")).status == 409
    same = ApiError(429, "later", retry_after_s=0.2)
    assert to_api_error(same) is same and same.headers["Retry-After"] == "1"
    assert json.loads(ApiError(400, "\ud800").response().body)["error"]["message"] == "\ud800"


async def ask(app: FastAPI, path: str) -> httpx.Response:
    """A GET without a network."""
    inside = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=inside, base_url="http://localhost") as client:
        return await client.get(path)


def test_a_bug_in_a_route_is_an_openai_500(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Server(settings_of(files / "base.gguf")))

    async def broken() -> None:
        raise KeyError("secret")

    app.add_api_route("/health2", broken)
    app.state.server._done.set()
    reply = asyncio.run(ask(app, "/health2"))
    assert reply.status_code == 500 and error_of(reply)["type"] == "server_error"
    assert "secret" not in reply.text and "KeyError: 'secret'" in caplog.text


def test_every_route_of_the_package_is_included(files: Path) -> None:
    paths = create_app(Server(settings_of(files / "base.gguf"))).openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"} <= set(
        paths
    )
