"""Queries to the other processes, each with one answer; none of them generates text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from minisrv.errors import MinisrvError
from minisrv.wire.events import failure_error
from minisrv.wire.messages import AnswerMsg

TIMEOUT_S = 30.0


class Queries:
    """The open queries by number: those without an answer, even if nobody waits for it any more.

    Between `hold` and `resume` nothing is sent, and those that nobody waits for are forgotten. All
    methods belong to one event loop.
    """

    def __init__(self) -> None:
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._sends: dict[int, Callable[[], None]] = {}
        self._on_hold = False

    def __len__(self) -> int:
        return len(self._open)

    async def ask(
        self, number: int, send: Callable[[], None], abort: Callable[[], None]
    ) -> dict[str, Any]:
        """The answer to the query `number`, which `send` sends; `abort` if nobody waits for it.

        Raises RequestFailedError for a refused query, MinisrvError after TIMEOUT_S.
        """
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[number], self._sends[number] = future, send
        try:
            if not self._on_hold:
                send()
        except BaseException:
            self._forget(number)
            raise
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await future
        except TimeoutError:
            raise MinisrvError(
                f"no answer came within {TIMEOUT_S:g} s", code="request_timeout", status=503
            ) from None
        finally:
            if self._on_hold:
                self._forget(number)
            elif number in self._open:
                abort()

    def deliver(self, answer: AnswerMsg) -> None:
        """Pass an answer to the caller that waits for it, if it still does."""
        future = self._forget(answer.query)
        if future is None or future.done():
            return
        if answer.failure is not None:
            future.set_exception(failure_error(answer.failure))
        else:
            future.set_result(answer.value)

    def hold(self) -> None:
        """No query will be answered before `resume`."""
        self._on_hold = True
        for number in [number for number, future in self._open.items() if future.done()]:
            self._forget(number)

    def resume(self) -> None:
        """Send again what somebody waits for."""
        self._on_hold = False
        for number, future in list(self._open.items()):
            if future.done():
                self._forget(number)
                continue
            try:
                self._sends[number]()
            except MinisrvError as error:
                self._forget(number)
                future.set_exception(error)

    def fail(self, numbers: Iterable[int], error: MinisrvError) -> None:
        """Fail those of these queries that are open."""
        for number in numbers:
            future = self._forget(number)
            if future is not None and not future.done():
                future.set_exception(error)

    def fail_all(self, error: MinisrvError) -> None:
        for future in self._open.values():
            if not future.done():
                future.set_exception(error)
        self._open.clear()
        self._sends.clear()

    def _forget(self, number: int) -> asyncio.Future[dict[str, Any]] | None:
        self._sends.pop(number, None)
        return self._open.pop(number, None)
