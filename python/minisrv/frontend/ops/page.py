"""GET / and /page/...: the chat page, plain files that hold no data.

The page shows text of models, so its policy lets nothing of that run or load: scripts, styles and
pictures come from this server only, and a text can never be parsed as HTML.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

FOLDER = Path(__file__).parent.parent / "page"
INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-DNS-Prefetch-Control": "off",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def _read_files() -> dict[str, _File]:
    """The files by their path in the folder."""
    files = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            name = path.relative_to(FOLDER).as_posix()
            files[name] = _File(content, _TYPES[path.suffix], etag)
    return files


def add_page(app: FastAPI) -> frozenset[bytes]:
    """Add the page; returns the paths of its files, which need no key."""
    files = _read_files()
    index = files.pop(INDEX)

    @app.get("/", response_class=Response)
    async def page(request: Request) -> Response:
        """The chat page."""
        return index.response(request)

    for name, file in files.items():
        _add_file(app, f"/page/{name}", file)
    return frozenset({b"/", *(f"/page/{name}".encode() for name in files)})


def _add_file(app: FastAPI, path: str, file: _File) -> None:
    @app.get(path, include_in_schema=False)
    async def page_file(request: Request) -> Response:
        return file.response(request)
