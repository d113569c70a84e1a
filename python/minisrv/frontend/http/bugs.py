"""Answers exceptions that nothing else has caught."""

from __future__ import annotations

import logging

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.errors import ErrorResponse

logger = logging.getLogger("minisrv.frontend")


class BugMiddleware:
    """A bug is a 500 if no response has begun. Lies within everything that adds headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception:
            if scope["type"] != "http":
                raise
            context = context_of(scope)
            logger.exception("request failed id=%s", context.request_id)
            if context.status is None:
                await ErrorResponse(context.internal_error())(scope, receive, send)
