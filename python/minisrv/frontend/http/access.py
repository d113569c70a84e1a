"""Who may call what: nothing without a key but the health routes, admin routes with the admin key.

Pure ASGI around the whole application. What is public is decided on the bytes of the path as the
client sent them, so nothing that is decoded, joined or matched later can differ from what was
decided. The admin routes ask for the level that the key gave (`require_admin`): that holds for
whatever spelling of a path leads to them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from enum import IntEnum
from pathlib import Path

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError, ForbiddenError, UnauthorizedError
from minisrv.frontend.http.errors import ErrorResponse

PUBLIC_PATHS = frozenset({b"/health", b"/ready"})
METRICS_PATH = b"/metrics"
_SCOPE_KEY = "minisrv.access"
_SCHEME = "bearer"


class Access(IntEnum):
    """What a key opens."""

    NONE = 0
    USER = 1
    ADMIN = 2


class Keys:
    """The keys of a server, hashed, and what each opens."""

    def __init__(self, user_keys: list[str], admin_key: str | None, *, loopback: bool) -> None:
        self._levels = [(_digest(key), Access.USER) for key in user_keys]
        if admin_key is not None:
            self._levels.append((_digest(admin_key), Access.ADMIN))
        self._open = Access.NONE if user_keys else Access.USER
        self._without_key = Access.ADMIN if not self._levels and loopback else self._open

    @classmethod
    def of(cls, config: ServerConfig, *, host_is_ours: bool = True) -> Keys:
        """Raises ConfigError for a key that is empty or cannot be in a header.

        host_is_ours: it is us who listen, and so on `config.host`.
        """
        user_keys = [*config.api_key, *_read_key_file(config.api_key_file)]
        for key in [*user_keys, *([] if config.admin_key is None else [config.admin_key])]:
            if not key.isascii() or not key.isprintable() or not key or " " in key:
                raise ConfigError("a key is empty or has other than printable ASCII characters")
        loopback = host_is_ours and _is_loopback(config.host)
        return cls(user_keys, config.admin_key, loopback=loopback)

    def access(self, headers: Headers) -> Access:
        """What the request's key opens; of two keys in one request, neither counts."""
        sent = _sent_keys(headers)
        if not sent or not self._levels:
            # Any page in a browser can have it send requests to this machine: no administrator.
            return self._open if "origin" in headers else self._without_key
        digest = _digest(sent[0])
        found = [level for known, level in self._levels if hmac.compare_digest(known, digest)]
        return max(found) if found and len(sent) == 1 else self._open


class AccessMiddleware:
    """Refuses requests without a key before anything else of them is read."""

    def __init__(self, app: ASGIApp, keys: Keys, *, public_paths: frozenset[bytes]) -> None:
        self._app = app
        self._keys = keys
        self._public = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its level, or answer 401."""
        if scope["type"] == "http":
            level = scope[_SCOPE_KEY] = self._keys.access(Headers(scope=scope))
            if level is Access.NONE and not self._is_public(scope):
                error = UnauthorizedError(
                    "this server needs a key: send 'Authorization: Bearer KEY' with a valid one"
                )
                response = ErrorResponse(error, {"WWW-Authenticate": "Bearer"})
                return await response(scope, receive, send)
        elif scope["type"] != "lifespan":  # there is no route for a WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        await self._app(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        path = scope.get("raw_path")
        return path in self._public and path == scope["path"].encode()


async def require_admin(request: Request) -> None:
    """A dependency of the admin routes. Raises ForbiddenError."""
    if request.scope[_SCOPE_KEY] is not Access.ADMIN:
        raise ForbiddenError(
            "this route needs the key of --admin-key (without any key, a server on a loopback "
            "--host)"
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _sent_keys(headers: Headers) -> list[str]:
    """The keys in a request's headers; a header of another form counts as a key that nobody has."""
    keys = headers.getlist("x-api-key")
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        keys.append(key.strip() if scheme.lower() == _SCHEME else "")
    return keys


def _read_key_file(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-key-file cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
