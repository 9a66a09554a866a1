"""A Hub on this machine: the endpoints that are asked for repositories and files, and its faults.

As on huggingface.co: the listing of a repository with sizes and hashes, small files from git, and
large ones by a redirect with LFS and Xet headers to a store of another origin, which knows ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".gguf", ".bin")
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Asked:
    """One request, as it arrived."""

    method: str
    path: str
    range: str
    authorization: str
    user_agent: str


@dataclass
class Fault:
    """What goes wrong with one file or repository.

    Attributes:
        cut_after: bytes of a response after which the line is cut; `n_cuts` times.
        stall_after: bytes after which nothing more comes, and the line stays open.
        bytes_instead: what is sent in place of the file, with a length that fits it.
        no_ranges: ranges are not known: the whole file comes.
        status, code: of the answers about the repository, and the Hub's word for it; `n_refusals`
            times.
        answer: the body of its listing, in place of the right one.
    """

    cut_after: int = -1
    n_cuts: int = 10**9
    stall_after: int = -1
    bytes_instead: bytes | None = None
    no_ranges: bool = False
    status: int = 0
    code: str = ""
    n_refusals: int = 10**9
    answer: object = None


@dataclass
class Hub:
    """Repositories by (kind, org/name), and what was asked of them so far."""

    url: str = ""
    store_url: str = ""
    repositories: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    cards: dict[tuple[str, str], dict[str, object]] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)

    def add(
        self, name: str, files: dict[str, bytes], *, kind: str = "models", licence: str = ""
    ) -> None:
        """Publish a repository; `.gitattributes` and a README come with it, as always."""
        extra = {".gitattributes": b"*.safetensors filter=lfs\n", "README.md": b"# A card\n"}
        self.repositories[kind, name] = {**extra, **files}
        self.cards[kind, name] = {"license": licence} if licence else {}

    def add_folder(self, name: str, folder: Path, **options: str) -> None:
        """Publish a folder's files as a model's repository."""
        self.add(name, {path.name: path.read_bytes() for path in folder.iterdir()}, **options)

    def fetched(self) -> list[str]:
        """The files that were asked for, each as often as it was asked for at the Hub."""
        found = (_RESOLVE.fullmatch(asked.path) for asked in self.asked)
        return [f"{match[2]}/{match[4]}" for match in found if match]

    def ranges(self) -> list[str]:
        """The ranges that the store was asked for; '' for a whole file."""
        return [asked.range for asked in self.asked if asked.path.startswith("/store/")]

    def commit(self, kind: str, name: str) -> str:
        """A commit's hash that changes with the files."""
        digest = hashlib.sha1(name.encode())
        for path, data in sorted(self.repositories[kind, name].items()):
            digest.update(path.encode() + data)
        return digest.hexdigest()

    def listing(self, kind: str, name: str) -> dict[str, object]:
        """What /api/models/org/name?blobs=true answers."""
        files = self.repositories[kind, name]
        return {
            "_id": "66a0", "id": name, "sha": self.commit(kind, name), "private": False,
            "gated": False, "disabled": False, "tags": ["peft"], "downloads": 3,
            "cardData": self.cards[kind, name],
            "siblings": [_sibling(path, data) for path, data in files.items()],
        }  # fmt: skip


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sibling(path: str, data: bytes) -> dict[str, object]:
    if not path.endswith(LARGE):
        return {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n".encode()
    lfs = {"sha256": sha256, "size": len(data), "pointerSize": len(pointer)}
    return {"rfilename": path, "size": len(data), "blobId": git_sha1(pointer), "lfs": lfs}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        said = [self.headers.get(key, "") for key in ("Range", "Authorization", "User-Agent")]
        self.hub.asked.append(Asked(self.command, path, *said))
        with contextlib.suppress(ConnectionError):
            if match := _API.fullmatch(path):
                self._list(match[1], match[2])
            elif match := _RESOLVE.fullmatch(path):
                self._resolve("datasets" if match[1] else "models", match[2], match[3], match[4])
            elif path.startswith("/store/"):
                self._send_from_store(path.removeprefix("/store/"))
            else:
                self._answer(404, b"", {"X-Error-Message": f"no endpoint {path}"})

    def _list(self, kind: str, name: str) -> None:
        fault = self.hub.faults.get(name, Fault())
        if self._refuses(fault) and fault.code != "GatedRepo":  # whose listing is public
            self._refuse(fault.status, fault.code)
        elif (kind, name) not in self.hub.repositories:
            self._refuse(401, "RepoNotFound")
        else:
            listing = self.hub.listing(kind, name) if fault.answer is None else fault.answer
            body = listing if isinstance(listing, bytes) else json.dumps(listing).encode()
            self._answer(200, body, {"Content-Type": "application/json"})

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        files = self.hub.repositories.get((kind, name), {})
        fault = self.hub.faults.get(name, self.hub.faults.get(f"{name}/{path}", Fault()))
        if self._refuses(fault):
            self._refuse(fault.status, fault.code)
        elif path not in files or revision != self.hub.commit(kind, name):
            self._refuse(404, "EntryNotFound" if path not in files else "RevisionNotFound")
        elif path.endswith(LARGE):
            self._answer(302, b"", self._pointer(kind, name, path, files[path]))
        else:
            self._send(files[path], fault, {"ETag": f'"{git_sha1(files[path])}"'})

    def _pointer(self, kind: str, name: str, path: str, data: bytes) -> dict[str, str]:
        sha256 = hashlib.sha256(data).hexdigest()
        return {
            "Location": f"{self.hub.store_url}/store/{kind}/{name}/{path}",
            "X-Repo-Commit": self.hub.commit(kind, name),
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(data)),
            "X-Xet-Hash": sha256,
            "Link": f'<{self.hub.url}/api/{kind}/{name}/xet-read-token/main>; rel="xet-auth"',
        }

    def _send_from_store(self, place: str) -> None:
        kind, org, name, path = place.split("/", 3)
        data = self.hub.repositories[kind, f"{org}/{name}"][path]
        fault = self.hub.faults.get(f"{org}/{name}/{path}", Fault())
        self._send(data, fault, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def _send(self, data: bytes, fault: Fault, headers: dict[str, str]) -> None:
        data = data if fault.bytes_instead is None else fault.bytes_instead
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, status = 0, 200
        if match and not fault.no_ranges:
            start, status = int(match[1]), 206
            if start >= len(data):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(status, data[start:], {**headers, "Accept-Ranges": "bytes"}, fault)

    def _refuses(self, fault: Fault) -> bool:
        fault.n_refusals -= 1
        return fault.status > 0 and fault.n_refusals >= 0

    def _refuse(self, status: int, code: str) -> None:
        message = {"RepoNotFound": "Invalid username or password.", "GatedRepo": "Access denied."}
        headers = {"X-Error-Code": code, "X-Error-Message": message.get(code, code)}
        self._answer(status, b"", {**headers, "Retry-After": "0"} if status == 429 else headers)

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and 0 <= fault.stall_after < len(body):
            self.wfile.write(body[: fault.stall_after])
            self.wfile.flush()
            self.hub.stalled.set()
            time.sleep(600)  # its client is killed before; the thread is a daemon
        elif fault is not None and 0 <= fault.cut_after < len(body) and fault.n_cuts > 0:
            fault.n_cuts -= 1
            self.wfile.write(body[: fault.cut_after])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(body)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A Hub and its store, each on a port of its own, for the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    hub.url, hub.store_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
