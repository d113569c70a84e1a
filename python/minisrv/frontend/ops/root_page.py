"""GET /: what this is, and where to go from here."""

from __future__ import annotations

from html import escape

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

_LINKS = {
    "docs": "the HTTP API",
    "v1/models": "the served model",
    "metrics": "figures for Prometheus",
    "ready": "whether requests are served",
    "v1/loads": "how busy the server is",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>minisrv</title></head>
<body><h1>minisrv {version}</h1><p>It serves <b>{model}</b> over an OpenAI-compatible API at
<code>/v1</code>.</p><ul>
{links}
</ul></body></html>
"""


def add_root_page(app: FastAPI, version: str, model: str) -> None:
    """Add the route. The links are relative, so that they work behind a proxy's path prefix."""
    links = "\n".join(
        f'<li><a href="{path}">/{path}</a>: {escape(text)}</li>' for path, text in _LINKS.items()
    )
    page = _PAGE.format(version=escape(version), model=escape(model), links=links)

    @app.get("/", response_class=HTMLResponse)
    async def root() -> Response:
        """A page with links."""
        return HTMLResponse(page)
