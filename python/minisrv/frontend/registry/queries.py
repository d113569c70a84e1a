"""Queries to the other processes, each with one answer; none of them generates text."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from minisrv.errors import MinisrvError
from minisrv.wire.events import failure_error
from minisrv.wire.messages import AnswerMsg

TIMEOUT_S = 30.0


class Queries:
    """The open queries by number. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, send: Callable[[int], None]) -> dict[str, Any]:
        """The answer to the query that `send(number)` sends.

        Raises RequestFailedError for a refused query, MinisrvError after TIMEOUT_S.
        """
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        try:
            send(number)
            async with asyncio.timeout(TIMEOUT_S):
                return await future
        except TimeoutError:
            error = MinisrvError(f"no answer came within {TIMEOUT_S:g} s", code="request_timeout")
            error.http_status = 503
            raise error from None
        finally:
            del self._open[number]

    def deliver(self, answer: AnswerMsg) -> None:
        """Pass an answer to the caller that waits for it; a late one is dropped."""
        future = self._open.get(answer.query)
        if future is None or future.done():
            return
        if answer.failure is not None:
            future.set_exception(failure_error(answer.failure))
        else:
            future.set_result(answer.value)

    def fail_all(self, error: MinisrvError) -> None:
        for future in self._open.values():
            if not future.done():
                future.set_exception(error)
