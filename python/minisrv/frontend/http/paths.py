"""Which paths are served: for HEAD, for the hints of a 404 and a 405, and under other prefixes."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from minisrv.errors import ConfigError

API_PREFIX = "/v1"
_METHODS = ("GET", "HEAD", "POST", "DELETE")
# A hint is looked for in the last parts of a path that is not longer.
_MAX_HINT_CHARS = 200
_MAX_PARTS = 4


def add_head_routes(router: FastAPI | APIRouter) -> None:
    """Answer HEAD on the routes of GET; the server leaves out the body."""
    for route in list(router.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            router.add_api_route(
                route.path,
                route.endpoint,
                methods=["HEAD"],
                dependencies=route.dependencies,
                include_in_schema=False,
            )


def methods_of(app: FastAPI, path: str) -> list[str]:
    """The methods that a path is served with; none for a path that is not served."""
    return [method for method in _METHODS if _serves(app, method, path)]


def similar_path(app: FastAPI, method: str, path: str) -> str | None:
    """A path that is served, and that differs from `path` by what comes before it only.

    That is what a client asks for whose base URL lacks /v1, or has it twice.
    """
    if len(path) > _MAX_HINT_CHARS:
        return None
    parts = path.strip("/").split("/")[-_MAX_PARTS:]
    for first in range(len(parts)):
        end = "/" + "/".join(parts[first:])
        for candidate in (end, API_PREFIX + end):
            if candidate != path and _serves(app, method, candidate):
                return candidate
    return None


def _serves(app: FastAPI, method: str, path: str) -> bool:
    scope = {"type": "http", "method": method, "path": path, "headers": []}
    return any(route.matches(scope)[0] is Match.FULL for route in app.routes)


class AliasMiddleware:
    """Serves the routes of /v1 under further prefixes, where a path is not served otherwise.

    It comes before the check of keys: access, errors and metrics are those of the route.
    """

    def __init__(self, app: ASGIApp, routes: FastAPI, prefixes: Sequence[str]) -> None:
        """routes: the application that has them. prefixes: as `read_prefix` returns them."""
        self._app = app
        self._routes = routes
        self._prefixes = prefixes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = self._renamed(scope)
        await self._app(scope, receive, send)

    def _renamed(self, scope: Scope) -> Scope:
        path, raw_path = scope["path"], scope["raw_path"]
        for prefix in self._prefixes:
            begin = f"{prefix}/".encode()
            if not raw_path.startswith(begin) or methods_of(self._routes, path):
                continue
            name = API_PREFIX + path.removeprefix(prefix)
            if methods_of(self._routes, name):
                raw_name = API_PREFIX.encode() + raw_path.removeprefix(prefix.encode())
                return {**scope, "path": name, "raw_path": raw_name}
        return scope


def read_prefix(text: str, option: str) -> str:
    """A path prefix without a slash at its end, "" for "/". Raises ConfigError naming `option`."""
    plain = text.isascii() and text.isprintable() and not set(text) & set(" %?#")
    if not text.startswith("/") or not plain or "//" in text:
        raise ConfigError(f"{option} is {text!r}; it must be a path such as /llm")
    return text.rstrip("/")
