"""The ingress: passes each request to a replica, and its response on as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayActorError
from starlette.datastructures import Headers

from minisrv.errors import EngineDeadError, MinisrvError, RequestTooLargeError
from minisrv.frontend.http.context import SESSION_HEADERS
from minisrv.frontend.http.error_format import error_body
from minisrv.ray.prompts import prompt_of

MAX_TRIES = 3
_SCOPE = (
    *("type", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("root_path", "headers", "client", "server"),
)

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Ingress:
    """replicas: the handle of their deployment. max_body_bytes: as --max-body-bytes."""

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._replicas = replicas.options(stream=True)
        self._max_body_bytes = max_body_bytes

    def __serve_build_asgi_app__(self) -> Any:
        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await self._respond(scope, receive, send)

        return app

    async def _respond(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        try:
            body = await self._read(receive)
        except MinisrvError as error:
            await _refuse(send, error)
            return
        prompt = prompt_of(body) if scope["method"] == "POST" else prompt_of(b"")
        kept = {name: scope[name] for name in _SCOPE if name in scope}
        call = {
            "scope": {**kept, "asgi": {"version": "3.0"}},
            "body": body,
            "prompt": (prompt.blocks, prompt.num_tokens, prompt.block_tokens, _session(scope)),
        }
        await self._forward(call, send)

    async def _read(self, receive: Receive) -> bytes:
        """The whole body. Raises RequestTooLargeError."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise RequestTooLargeError(
                    f"the body has more than {self._max_body_bytes} bytes; raise --max-body-bytes"
                )
            if not message.get("more_body"):
                return bytes(body)

    async def _forward(self, call: Message, send: Send) -> None:
        """Send a request to a replica; to another one if it dies before it answers."""
        for number in range(1, MAX_TRIES + 1):
            start: Message = {}
            responses = self._replicas.handle.remote(call)
            try:
                async for message in responses:
                    start = start or message
                    await send(message)
                return
            except RayActorError:
                if start:
                    return await _break_off(start, send)
                if number == MAX_TRIES:
                    return await _refuse(send, _lost())
            except asyncio.CancelledError:
                responses.cancel()
                raise


def _session(scope: Message) -> str:
    """What the client calls its conversation in a header; empty without one."""
    headers = Headers(raw=scope.get("headers", []))
    return next((headers[name] for name in SESSION_HEADERS if headers.get(name)), "")


def _lost() -> MinisrvError:
    return EngineDeadError("the replica that had this request has died")


async def _refuse(send: Send, error: MinisrvError) -> None:
    """A response that is an error."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error_body(error)).encode()})


async def _break_off(start: Message, send: Send) -> None:
    """End a response whose replica has died: a stream with an error event."""
    headers = {name.lower(): value for name, value in start["headers"]}
    if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        raise _lost()
    event = f"data: {json.dumps(error_body(_lost()))}\n\ndata: [DONE]\n\n"
    await send({"type": "http.response.body", "body": event.encode()})
