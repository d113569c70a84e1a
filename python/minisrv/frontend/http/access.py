"""Access by key: nothing without a key except the health routes, admin routes with the admin key.

While there are no API keys, what is served without one depends on the Host header (`hosts`).

Pure ASGI around the whole application. Whether a path is public is decided on its bytes as the
client sent them, so later decoding, joining or matching cannot change the decision. The admin
routes check the level that the key gave (`require_admin`), whatever spelling of a path leads there.
"""

from __future__ import annotations

import hashlib
import hmac
from enum import IntEnum
from pathlib import Path

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError, ForbiddenError, HostNotAllowedError, UnauthorizedError
from minisrv.frontend.http.context import PROBE_PATHS
from minisrv.frontend.http.errors import ErrorResponse
from minisrv.frontend.http.hosts import AllowedHosts, is_loopback

PUBLIC_PATHS = frozenset(path.encode() for path in PROBE_PATHS)
METRICS_PATH = b"/metrics"
_SCOPE_KEY = "minisrv.access"
_NUMBER_KEY = "minisrv.key"


class Access(IntEnum):
    """The level that a key gives."""

    NONE = 0
    USER = 1
    ADMIN = 2


class Keys:
    """The keys of a server, hashed, and the level that each gives."""

    def __init__(self, user_keys: list[str], admin_key: str | None, *, loopback: bool) -> None:
        self._levels = [(_digest(key), Access.USER) for key in user_keys]
        if admin_key is not None:
            self._levels.append((_digest(admin_key), Access.ADMIN))
        self._open = Access.NONE if user_keys else Access.USER
        self._without_key = Access.ADMIN if not self._levels and loopback else self._open

    @classmethod
    def of(cls, config: ServerConfig, *, host_is_ours: bool = True) -> Keys:
        """Raises ConfigError for a key that is empty or cannot be in a header.

        host_is_ours: this process listens itself, on `config.host`.
        """
        user_keys = [*config.api_key, *_read_key_file(config.api_key_file)]
        for key in [*user_keys, *([] if config.admin_key is None else [config.admin_key])]:
            if not key.isascii() or not key.isprintable() or not key or " " in key:
                raise ConfigError("a key is empty or has other than printable ASCII characters")
        loopback = host_is_ours and is_loopback(config.host)
        return cls(user_keys, config.admin_key, loopback=loopback)

    @property
    def always_needed(self) -> bool:
        """Whether no request without a key has any access."""
        return self._open is Access.NONE

    def access(self, headers: Headers) -> tuple[Access, bool]:
        """The level of a request, and whether a valid key gave it.

        If there are any keys, a request with two different ones has no access.
        """
        sent = _sent_keys(headers)
        if not sent or not self._levels:
            # Any page in a browser can have it send requests to this machine: no administrator.
            return self._open if _is_of_another_page(headers) else self._without_key, False
        if len(set(sent)) > 1:
            return Access.NONE, False
        digest = _digest(sent[0])
        found = [level for known, level in self._levels if hmac.compare_digest(known, digest)]
        return (max(found), True) if found else (self._open, False)

    def number(self, headers: Headers) -> int:
        """The place of the request's key among the server's, from 1; 0 without one of them."""
        sent = _sent_keys(headers)
        if len(set(sent)) != 1:
            return 0
        digest = _digest(sent[0])
        found = [hmac.compare_digest(known, digest) for known, _ in self._levels]
        return found.index(True) + 1 if any(found) else 0


class AccessMiddleware:
    """Answers 401 or 421 to a request that has no access before anything else of it is read."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        hosts: AllowedHosts,
        *,
        public_paths: frozenset[bytes],
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = hosts
        self._public = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            level, has_key = self._keys.access(headers)
            scope[_SCOPE_KEY] = level
            scope[_NUMBER_KEY] = self._keys.number(headers)
            path = scope.get("raw_path")
            is_public = path in self._public and path == scope["path"].encode()
            if level is Access.NONE and not is_public:
                error = UnauthorizedError(
                    "this server needs a key: send 'Authorization: Bearer KEY' with a valid one, "
                    "and no second key"
                )
                response = ErrorResponse(error, {"WWW-Authenticate": "Bearer"})
                return await response(scope, receive, send)
            if not has_key and not is_public and not self._hosts.allow(headers):
                sent = ", ".join(headers.getlist("host"))[:100]
                refusal = HostNotAllowedError(
                    f"without a key this server does not answer requests to the host {sent!r}: "
                    "add it with --allowed-host, or set --api-key"
                )
                return await ErrorResponse(refusal)(scope, receive, send)
        elif scope["type"] != "lifespan":  # there is no route for a WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        await self._app(scope, receive, send)


def key_number_of(scope: Scope) -> int:
    """The number of a request's key; 0 without a key."""
    number: int = scope[_NUMBER_KEY]
    return number


async def require_admin(request: Request) -> None:
    """A dependency of the admin routes. Raises ForbiddenError."""
    if request.scope[_SCOPE_KEY] is not Access.ADMIN:
        raise ForbiddenError(
            "this route needs the key of --admin-key (if no keys are set: a loopback --host)"
        )


def _is_of_another_page(headers: Headers) -> bool:
    """Whether a browser may have sent this for a page of another origin.

    With a GET there may be no Origin. Clients other than browsers send neither header.
    """
    site = headers.get("sec-fetch-site", "none")
    return "origin" in headers or site not in ("none", "same-origin")


def _sent_keys(headers: Headers) -> list[str]:
    sent = headers.getlist("x-api-key")
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        # A header of another scheme counts as an unknown key.
        sent.append(key.strip() if scheme.lower() == "bearer" else "")
    return sent


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read_key_file(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-key-file cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} has no keys")
    return keys
