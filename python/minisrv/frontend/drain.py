"""The end of serving: new requests are refused, those that are open may end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from minisrv import log
from minisrv.frontend.registry.registry import RequestRegistry

logger = logging.getLogger("minisrv.frontend")

_POLL_S = 0.05
# Requests that are on their way when the drain begins get a 503, not a closed connection.
_LEAST_S = 0.2


async def drain(registry: RequestRegistry, is_idle: Callable[[], bool], timeout_s: float) -> None:
    """Refuse new requests and wait until `is_idle`, for at most `timeout_s`."""
    registry.start_drain()
    values = {"open": registry.num_open, "timeout_s": timeout_s}
    log.event(logger, logging.INFO, "draining", values)
    began = time.monotonic()
    await asyncio.sleep(min(_LEAST_S, timeout_s))
    while not is_idle() and time.monotonic() < began + timeout_s:
        await asyncio.sleep(_POLL_S)
    values = {"open": registry.num_open, "ms": round((time.monotonic() - began) * 1000)}
    log.event(logger, logging.INFO, "drained", values)
