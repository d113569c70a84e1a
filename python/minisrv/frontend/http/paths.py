"""Which paths are served: for HEAD, for the hints of a 404 and a 405, and under other prefixes."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

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


class PrefixMiddleware:
    """Takes off a proxy's path prefix, and serves the routes of /v1 under further prefixes.

    It comes before the check of keys: access, errors and metrics are those of the route.
    """

    def __init__(
        self, app: ASGIApp, routes: FastAPI, root_path: str, aliases: Sequence[str]
    ) -> None:
        """routes: the application that has them. The prefixes have no slash at their end.

        root_path: not to be seen by the application; the proxy may have taken it off already.
        aliases: stand for /v1 where a path is not served otherwise.
        """
        self._app = app
        self._routes = routes
        self._root_path = root_path
        self._aliases = aliases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if self._root_path and (inner := _replaced(scope, self._root_path, "")):
                scope = {**inner, "root_path": ""}
            scope = self._without_alias(scope)
        await self._app(scope, receive, send)

    def _without_alias(self, scope: Scope) -> Scope:
        for alias in self._aliases:
            renamed = _replaced(scope, alias, API_PREFIX)
            if renamed is None or methods_of(self._routes, scope["path"]):
                continue
            if methods_of(self._routes, renamed["path"]):
                return renamed
        return scope


def _replaced(scope: Scope, prefix: str, by: str) -> Scope | None:
    """The scope with another prefix, as the client sent it and decoded; None if it has another."""
    path, raw_path = scope["path"], scope["raw_path"]
    if not raw_path.startswith(f"{prefix}/".encode()):
        return None
    raw_name = by.encode() + raw_path.removeprefix(prefix.encode())
    return {**scope, "path": by + path.removeprefix(prefix), "raw_path": raw_name}
