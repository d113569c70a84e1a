"""GET /: what this is, and where to go from here."""

from __future__ import annotations

from html import escape

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

# The links are relative, so that they work behind a proxy's path prefix.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>minisrv</title></head>
<body><h1>minisrv {version}</h1><p>It serves <b>{model}</b> over an OpenAI-compatible API at
<code>/v1</code>.</p><ul>
<li><a href="docs">/docs</a>: the HTTP API</li>
<li><a href="v1/models">/v1/models</a>: the served model</li>
<li><a href="metrics">/metrics</a>: figures for Prometheus</li>
<li><a href="ready">/ready</a>: whether requests are served</li>
<li><a href="v1/loads">/v1/loads</a>: how busy the server is</li>
</ul></body></html>
"""


def add_root_page(app: FastAPI, version: str, model: str) -> None:
    page = _PAGE.format(version=escape(version), model=escape(model))

    @app.get("/", response_class=HTMLResponse)
    async def root() -> Response:
        """A page with links."""
        return HTMLResponse(page)
