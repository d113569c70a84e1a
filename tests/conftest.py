"""For every test, also on slow machines. The tests for a GPU run without these packages."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

import pytest

with contextlib.suppress(ImportError):
    from httpx._transports import default

    # The certificates of the web are read once: httpx takes 50 ms for them, for each client and so
    # for each httpx.get, and the servers of the tests speak plain HTTP.
    default.create_ssl_context = functools.cache(default.create_ssl_context)

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # No test of this kind is about time, and a process may have to wait for a processor.
    settings.register_profile(
        "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that a test runs in this process writes its log to stderr, also for later tests."""
    logger = logging.getLogger("minisrv")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
