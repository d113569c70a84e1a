"""For every test, also on slow machines. The tests for a GPU run without these packages."""

from __future__ import annotations

import contextlib
import functools

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
