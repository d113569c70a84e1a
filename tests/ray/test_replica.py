"""What a replica of minisrv.ray does with a response, without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

from minisrv.ray.replica import MAX_WAITING, Replica

NUM_PIECES = 3 * MAX_WAITING


class _Replica(Replica):
    """With another application."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def __del__(self) -> None:  # type: ignore[override]
        pass


class _App:
    """Sends many pieces; it does not look for a client that has left while it sends."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(NUM_PIECES):
            more = number < NUM_PIECES - 1
            await send({"type": "http.response.body", "body": b"x", "more_body": more})
        self.ended.set()


def test_a_response_is_passed_on_to_its_end() -> None:
    async def run() -> None:
        app = _App()
        messages = [one async for one in _Replica(app).handle({"scope": {}, "body": b""})]
        assert len(messages) == 1 + NUM_PIECES
        await app.ended.wait()

    asyncio.run(run())


def test_a_caller_that_leaves_during_a_silence_leaves_no_task_behind() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def run() -> None:
        responses = _Replica(silent).handle({"scope": {}, "body": b""})
        caller = asyncio.ensure_future(anext(responses))
        await asyncio.sleep(0.01)
        caller.cancel()
        await asyncio.wait([caller])
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_an_application_that_sends_ends_when_its_caller_has_left() -> None:
    async def run() -> None:
        app = _App()
        responses = _Replica(app).handle({"scope": {}, "body": b""})
        await anext(responses)
        for _ in range(2 * MAX_WAITING):
            await asyncio.sleep(0)  # the application waits for room
        await responses.aclose()
        await asyncio.wait_for(app.ended.wait(), 5)

    asyncio.run(run())
