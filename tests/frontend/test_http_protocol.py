"""The head of a request, before any of the application runs."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import pytest
import uvicorn

from minisrv.frontend.http.protocol import HttpProtocol
from minisrv.frontend.http.protocol import HttpServer as OwnServer
from tests.support.http_server import HttpServer
from tests.support.server_process import wait_until

HEAD = b"GET /health HTTP/1.1\r\nHost: a\r\n"


def exchange(server: HttpServer, *pieces: bytes) -> tuple[bytes, bytes]:
    """The status line and the body of the answer to what is sent piece by piece."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except ConnectionError:
            pass  # refused before the end
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0], body


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD + b"X: " + b"a" * 70_000 + b"\r\n\r\n"],
        [HEAD + b"X: ", *[b"a" * 10_000] * 40],
        [HEAD, *[b"X: " + b"a" * 1000 + b"\r\n"] * 99, b"\r\n"],
        [b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"],
        [b"GET /", *[b"a" * 10_000] * 40],
    ],
    ids=["one header", "no end", "many", "long path", "endless path"],
)
def test_a_head_out_of_bounds_is_cut_off(server: HttpServer, pieces: list[bytes]) -> None:
    status, _ = exchange(server, *pieces)
    # The answer can be lost to a client that goes on sending: it then sees a reset.
    assert status in (b"HTTP/1.1 431 Request Header Fields Too Large", b"")
    assert server.http.get("/health").status_code == 200


def test_a_head_with_too_many_headers_is_431_in_the_one_form(server: HttpServer) -> None:
    status, body = exchange(server, HEAD + b"X: a\r\n" * 100 + b"\r\n")
    assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert "65536 bytes and 100 headers" in error["message"]


def test_a_head_within_bounds_passes_in_pieces_and_twice_on_a_connection(
    server: HttpServer,
) -> None:
    headers = [b"X: " + b"a" * 600 + b"\r\n"] * 97
    once = [HEAD, *headers, b"\r\n"]
    status, body = exchange(server, *once, HEAD, *headers, b"Connection: close\r\n\r\n")
    assert status == b"HTTP/1.1 200 OK"
    assert body.count(b"HTTP/1.1 200 OK") == 1


def test_a_large_body_does_not_count_for_the_head(server: HttpServer) -> None:
    assert server.chat("x" * 500_000).status_code == 200


def test_what_is_not_http_is_a_400_in_the_one_form(server: HttpServer) -> None:
    status, body = exchange(server, b"\x16\x03\x01 not http\r\n\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    assert json.loads(body)["error"]["message"] == "Invalid HTTP request received."


def test_the_server_is_idle_when_each_whole_request_has_been_answered_and_read() -> None:
    """A body that is still arriving does not count, a reply that nobody reads does."""
    release = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/wait":
            await asyncio.to_thread(release.wait)
        body = b"x" * (20_000_000 if scope["path"] == "/large" else 2)
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    options = {"port": 0, "log_config": None, "lifespan": "off", "http": HttpProtocol}
    server = OwnServer(uvicorn.Config(app, timeout_graceful_shutdown=1, **options))  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    wait_until(lambda: server.started)
    address = server.servers[0].sockets[0].getsockname()

    def send(data: bytes) -> socket.socket:
        connection = socket.create_connection(address)
        connection.sendall(data)
        return connection

    def num_begun() -> int:
        """Connections on which a request has begun."""
        return sum(connection.cycle is not None for connection in server._connections)

    def read(connection: socket.socket, num_bytes: int = 2) -> bytes:
        data = bytearray()
        while not data.endswith(b"x") or data.count(b"x") < num_bytes:
            data += connection.recv(2**20)
        return bytes(data)

    try:
        with (
            send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") as kept,
            send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{") as half,
        ):
            read(kept)
            wait_until(lambda: num_begun() == 2)
            wait_until(lambda: server.is_idle)
            with send(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n") as unread:
                wait_until(lambda: not server.is_idle)
                time.sleep(0.2)
                assert not server.is_idle
                read(unread, 20_000_000)
                wait_until(lambda: server.is_idle)
            kept.sendall(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: not server.is_idle)
            server.announce_close()
            release.set()
            assert b"connection: close" in read(kept, 4)
            half.sendall(b"x" * 8)
            assert b"connection: close" in read(half)
            wait_until(lambda: server.is_idle)
    finally:
        release.set()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
