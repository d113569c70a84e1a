"""A request of a command to a server, such as `minisrv chat` sends it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from minisrv.errors import MinisrvError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class UnreachableError(MinisrvError):
    """No server answers, or not in HTTP."""


def send_request(
    url: str, headers: Mapping[str, str], body: Any = None, *, timeout_s: float
) -> HTTPResponse:
    """Send a GET, or with a body (to be sent as JSON) a POST; follows no redirect.

    Raises urllib.error.HTTPError for a status that is an error, UnreachableError.
    """
    data = None if body is None else json.dumps(body).encode()
    fields = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, data, fields)
    # No proxy is asked for what is on this machine.
    local = urlsplit(url).hostname in _LOOPBACK
    proxies = [urllib.request.ProxyHandler({})] if local else []
    opener = urllib.request.build_opener(_NoRedirects, *proxies)
    try:
        response: HTTPResponse = opener.open(request, timeout=timeout_s)
    except urllib.error.HTTPError:
        raise
    except (OSError, HTTPException, ValueError) as error:  # such as a redirect to http://[
        raise UnreachableError(str(getattr(error, "reason", None) or error).strip()) from None
    return response


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The API key is for the given server only, and a redirected POST would lose its body."""

    def redirect_request(self, *args: Any) -> None:
        raise UnreachableError(f"it redirects to {args[-1]}")
