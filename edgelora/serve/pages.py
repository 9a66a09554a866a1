"""The static page at /: files that travel in the package, with the headers that fence them in."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response

from edgelora.errors import InvalidFile

FOLDER = Path(__file__).parent / "web"
_INDEX = "index.html"
# Types by our own list: mimetypes asks the system, and Windows' registry may say anything.
_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
}
_CSP = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Page:
    """One file: its bytes, its type, and its ETag."""

    content: bytes
    media_type: str
    etag: str


def read_pages(folder: Path = FOLDER) -> Mapping[str, Page]:
    """Every file of the folder by its path in URLs; index.html is also /.

    Raises:
        InvalidFile: there is no page: the package is not whole.
    """
    pages = {
        f"/{path.name}": _page(path)
        for path in sorted(folder.glob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    if f"/{_INDEX}" not in pages:
        raise InvalidFile(f"{folder / _INDEX}: missing", hint="Install EdgeLoRA again.")
    return {"/": pages[f"/{_INDEX}"]} | pages


def add_pages(app: FastAPI, pages: Mapping[str, Page]) -> None:
    """A route for each page; they are not part of the OpenAPI document."""
    for path, page in pages.items():
        app.add_api_route(path, _endpoint(page), methods=["GET", "HEAD"], include_in_schema=False)


def _endpoint(page: Page):  # type: ignore[no-untyped-def]
    async def get(request: Request) -> Response:
        headers = _HEADERS | {"ETag": page.etag}
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if page.etag in known:
            return Response(status_code=304, headers=headers)
        return Response(page.content, headers=headers, media_type=page.media_type)

    return get


def _page(path: Path) -> Page:
    content = path.read_bytes()
    media_type = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return Page(content, media_type or "application/octet-stream", etag)
