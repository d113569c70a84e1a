"""The head of a request, before any of the application runs."""

from __future__ import annotations

import json
import socket

import pytest

from tests.support.http_server import HttpServer

HEAD = b"GET /health HTTP/1.1\r\nHost: a\r\n"


def exchange(server: HttpServer, *pieces: bytes) -> tuple[bytes, bytes]:
    """The status line and the body of the answer to what is sent piece by piece."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
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


def test_what_is_no_http_is_a_400_in_the_one_form(server: HttpServer) -> None:
    status, body = exchange(server, b"\x16\x03\x01 not http\r\n\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    assert json.loads(body)["error"]["message"] == "Invalid HTTP request received."
