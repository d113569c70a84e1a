"""Keeps this process off the network: what a client would send home fails the test."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_refused: list[str] | None = None


@contextlib.contextmanager
def no_network() -> Iterator[list[str]]:
    """Refuses all addresses but those of loopback, in C code too; yields what was refused."""
    global _refused
    _refused = refused = []
    try:
        yield refused
    finally:
        _refused = None


def _check(event: str, arguments: tuple[Any, ...]) -> None:
    if _refused is None or event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        return
    target = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    host = target[0] if isinstance(target, tuple) else target
    # Without a host it is an own address; a path is a socket of this machine.
    if isinstance(host, str) and host not in _LOOPBACK and not host.startswith("/"):
        _refused.append(f"{event} {host}")
        raise OSError(f"a test may not reach {host}")


sys.addaudithook(_check)  # it can never be removed
