"""GET /docs and /redoc: pages over /openapi.json, plain files that hold no data.

Swagger UI and ReDoc come from the package fastapi_offline. They write styles into the page; all
that they load comes from this server.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, Response

from minisrv.frontend.ops.page import HEADERS

FOLDER = Path(__file__).parent.parent / "docs_page"
_VIEWERS = ("swagger-ui.css", "swagger-ui-bundle.js")
_REDOC = "redoc.standalone.js"
# The policy forbids a browser to load it, but the browser would report that as a failure.
_REDOC_LOGO = b"https://cdn.redoc.ly/redoc/logo-mini.svg"
_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {**HEADERS, "Content-Security-Policy": _POLICY}


def add_docs(app: FastAPI) -> frozenset[bytes]:
    """Add the pages; returns the paths of their files, which need no key."""
    files = {f"/{name}": FOLDER / f"{name}.html" for name in ("docs", "redoc")}
    files |= {f"/docs/{name}": FOLDER / name for name in ("docs.css", "docs.js")}
    files |= {f"/docs/{name}": _viewers_folder() / name for name in _VIEWERS}
    for path, file in files.items():
        _add_file(app, path, file)
    redoc_path = f"/docs/{_REDOC}"
    _add_redoc(app, redoc_path)
    return frozenset(path.encode() for path in (*files, redoc_path))


def _viewers_folder() -> Path:
    spec = find_spec("fastapi_offline")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "static"


def _add_file(app: FastAPI, path: str, file: Path) -> None:
    @app.get(path, include_in_schema=False)
    async def docs_file() -> Response:
        return FileResponse(file, headers=_HEADERS)


def _add_redoc(app: FastAPI, path: str) -> None:
    """Add ReDoc without its logo, which is elsewhere."""

    @app.get(path, include_in_schema=False)
    async def redoc() -> Response:
        script = (_viewers_folder() / _REDOC).read_bytes().replace(_REDOC_LOGO, b"page/favicon.svg")
        return Response(script, media_type="text/javascript", headers=_HEADERS)
