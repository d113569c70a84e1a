"""Every test: httpx reads the certificates of the web once, not for each client and each request.

That takes 50 ms, and the servers of the tests speak plain HTTP.
"""

from __future__ import annotations

import functools

try:
    from httpx._transports import default
except ImportError:  # the tests for a GPU run without it
    pass
else:
    default.create_ssl_context = functools.cache(default.create_ssl_context)
