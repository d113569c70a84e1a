"""A replica: a whole server in Ray's actor, with its frontend in the actor's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from minisrv import log
from minisrv.config import ServerConfig
from minisrv.frontend.app import close_app, create_app
from minisrv.frontend.ops.admin import load_of
from minisrv.frontend.registry.states import Dead, Serving
from minisrv.frontend_manager import FrontendManager
from minisrv.ray.autoscaling import QUEUED_TOKENS

MAX_WAITING = 64  # messages of a response that Ray has not taken yet


class Replica:
    """Its constructor returns when the model serves, so Ray sends nothing before."""

    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc]
        config = ServerConfig(**options)
        log.setup("frontend", config.log_level, config.log_format)
        self._manager = FrontendManager(config)
        self._app = create_app(
            config,
            self._manager.registry,
            host_is_ours=False,
            start_drain=self._manager.start_drain,
        )
        await self._manager.start()

    async def handle(self, call: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The ASGI messages of the response to a request.

        call: the `scope` without objects, the `body`, and what the router reads. When the caller
        goes away, the application sees that its client has left.
        """
        outgoing: asyncio.Queue[Any] = asyncio.Queue(MAX_WAITING)
        left = asyncio.Event()

        async def send(message: Any) -> None:
            if not left.is_set():
                await outgoing.put(message)

        incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": call["body"]})
        running = asyncio.create_task(self._app(call["scope"], incoming.get, send))
        try:
            while True:
                waiting = asyncio.ensure_future(outgoing.get())
                await asyncio.wait((waiting, running), return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done() and outgoing.empty():
                    waiting.cancel()
                    await running  # raises what ended it
                    return
                message = await waiting
                yield message
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    return
        finally:
            left.set()
            waiting.cancel()
            while not outgoing.empty():  # a send that waits for room returns
                outgoing.get_nowait()
            incoming.put_nowait({"type": "http.disconnect"})
            running.add_done_callback(_ignore_error)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router knows of this replica; `at` is Unix time."""
        registry = self._manager.registry
        return {
            **load_of(registry),
            "ready": isinstance(registry.state, Serving),
            "restarts": registry.restarts.get("scheduler", 0),
            "at": time.time(),
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What QueuedTokensPolicy adds up."""
        return {QUEUED_TOKENS: float(load_of(self._manager.registry).get("num_queued_tokens", 0))}

    async def check_health(self) -> None:
        """Raise when the server has given up, so that Ray starts another replica.

        A process that dies is started again by the server itself, which keeps its requests.
        """
        state = self._manager.registry.state
        if isinstance(state, Dead):
            raise RuntimeError(state.error.message)

    async def __del__(self) -> None:
        """Ray calls this when it has sent the last request."""
        with contextlib.suppress(AttributeError):  # the constructor has failed
            await self._manager.drain()
            await self._manager.aclose()
            close_app(self._app)


def _ignore_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()
