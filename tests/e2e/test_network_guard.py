"""The network guard of these tests works in this process."""

from __future__ import annotations

import socket

import httpx
import pytest


@pytest.mark.parametrize("url", ["http://192.0.2.1/", "http://example.com/"])
def test_the_network_is_out_of_reach(url: str, refused: list[str]) -> None:
    with pytest.raises((OSError, httpx.HTTPError)):
        httpx.get(url, timeout=1)
    assert refused
    refused.clear()


def test_loopback_is_in_reach(refused: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        socket.create_connection(listener.getsockname()).close()
    assert not refused
