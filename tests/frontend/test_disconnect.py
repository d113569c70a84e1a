"""Clients that leave, that wait long, or that read slowly."""

import json
import logging
import socket
import struct
import time
from typing import Any

import httpx
import pytest

from minisrv.frontend.generation import run as responder
from minisrv.frontend.http import body as http_body
from minisrv.frontend.http import protocol
from minisrv.wire.messages import Finish
from tests.support.http_server import HttpServer, serve
from tests.support.scripted_backend import TEXT, reply
from tests.support.server_process import wait_until

CHAT = "/v1/chat/completions"


def body(content: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def leave(server: HttpServer, content: str, *, stream: bool, n: int = 1) -> list[int]:
    """Send a request, close the connection once it runs behind; its uids."""
    num_requests = len(server.backend.requests)
    host, port = server.url.removeprefix("http://").split(":")
    payload = server.http.build_request("POST", CHAT, json=body(content, stream=stream, n=n))
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in payload.headers.items())
        connection.sendall(head.encode() + b"\r\n" + payload.read())
        server.wait_until(lambda: len(server.backend.requests) > num_requests)
        if content == "stall" and stream:
            assert b"Hello" in receive_until(connection, b"Hello")
    uid = server.backend.requests[-1].uid
    return list(range(uid, uid + n))


def receive_until(connection: socket.socket, text: bytes) -> bytes:
    data = b""
    while text not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    return data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("content", ["silent", "stall"])
def test_a_client_that_leaves_aborts_its_request(
    server: HttpServer, content: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minisrv")
    uids = leave(server, content, stream=stream, n=2)
    server.wait_until(lambda: set(uids) <= set(server.backend.aborted))
    server.wait_until(lambda: server.registry.num_open == 0)
    server.wait_until(lambda: "status=499" in caplog.text)
    assert "Traceback" not in caplog.text


def test_the_abort_goes_to_the_tokenizer_that_has_the_request() -> None:
    with serve(num_tokenizers=3) as server:
        uids = [leave(server, "silent", stream=True) for _ in range(5)]
        server.wait_until(lambda: len(server.backend.aborted) == len(uids))
        took = {m.uid: index for index, m in server.backend.sent if hasattr(m, "uid")}
        assert sorted(took.values()) == [0, 0, 1, 1, 2]
        for index, message in server.backend.sent:
            if hasattr(message, "uids"):
                assert [took[uid] for uid in message.uids] == [index]


def test_a_client_that_leaves_while_it_sends_its_body_leaves_nothing(server: HttpServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    num_requests = len(server.backend.requests)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            'Content-Length: 100\r\n\r\n{"mess'.encode()
        )
    assert server.chat().status_code == 200
    assert len(server.backend.requests) == num_requests + 1


def test_a_body_that_does_not_come_is_408(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_body, "BODY_TIMEOUT_S", 0.05)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Content-Length: 100\r\n\r\n{".encode()
        )
        assert b" 408 " in receive_until(connection, b"within 0.05 s")


def test_a_body_announced_as_too_large_is_413_before_it_arrives(server: HttpServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Content-Length: 10000000\r\n\r\n".encode()
        )
        assert b" 413 " in receive_until(connection, b"--max-body-bytes")


def test_a_silent_stream_is_opened_and_kept_alive_by_comments(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder, "FIRST_PING_S", 0.05)
    monkeypatch.setattr(responder, "PING_S", 0.05)
    with server.http.stream("POST", CHAT, json=body("silent", stream=True)) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]


def test_after_a_ping_a_refusal_is_an_error_event(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder, "FIRST_PING_S", 0.02)
    monkeypatch.setattr(server.backend, "_step_s", 0.2)
    response = server.chat("refuse", stream=True)
    assert response.status_code == 200
    assert response.text.startswith(": ping\n\n")
    assert '"code":"context_length_exceeded"' in response.text.replace(" ", "")
    assert response.text.endswith("data: [DONE]\n\n")


def test_the_openai_client_ignores_pings(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder, "FIRST_PING_S", 0.01)
    monkeypatch.setattr(responder, "PING_S", 0.01)
    monkeypatch.setattr(server.backend, "_step_s", 0.05)
    stream = server.openai.chat.completions.create(stream=True, model="", **body("hi"))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT


WORD = "Q" * 10_000


def flood(server: HttpServer, uid: int, num_steps: int) -> None:
    """Deliver more at once than the client can have read."""

    def deliver() -> None:
        for i in range(num_steps):
            server.backend.deliver(reply(uid, WORD, i + 2))

    server.in_loop(deliver)


def fill_the_way(server: HttpServer, uid: int) -> None:
    """What the kernel and the server's buffer take, in pieces far below the limit."""
    for _ in range(100):
        flood(server, uid, 20)
        time.sleep(0.005)
        pending = server.in_loop(lambda: server.registry._owners[uid].pending)
        if pending:
            return


def test_output_that_is_not_read_waits_and_delays_nobody(server: HttpServer) -> None:
    with server.http.stream("POST", CHAT, json=body("stall", stream=True)) as response:
        uid = server.backend.requests[-1].uid
        fill_the_way(server, uid)
        flood(server, uid, 60)
        began = time.monotonic()
        assert server.chat().status_code == 200
        assert time.monotonic() - began < 10
        server.in_loop(lambda: server.backend.deliver(reply(uid, "", 90, Finish.LENGTH)))
        text = response.read().decode()
    assert text.count("Q") % len(WORD) == 0
    assert text.endswith("data: [DONE]\n\n")


def test_output_beyond_the_limit_aborts_the_request_and_closes_the_connection(
    server: HttpServer,
) -> None:
    dropped = server.registry.num_dropped
    with server.http.stream("POST", CHAT, json=body("stall", stream=True)) as response:
        uid = server.backend.requests[-1].uid
        fill_the_way(server, uid)
        flood(server, uid, 400)
        server.wait_until(lambda: server.registry.num_open == 0)
        assert uid in server.backend.aborted
        with pytest.raises(httpx.TransportError):
            response.read()
    assert server.registry.num_dropped == dropped + 1
    assert "minisrv:dropped_streams_total" in server.http.get("/metrics").text
    assert server.chat().status_code == 200


@pytest.mark.parametrize("reads", [False, True])
def test_a_connection_is_closed_when_its_client_reads_nothing_at_all(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    """One that reads slowly keeps it."""
    monkeypatch.setattr(protocol, "UNREAD_S", 1.5)
    with server.http.stream("POST", CHAT, json=body("stall", stream=True)) as response:
        uid = server.backend.requests[-1].uid
        fill_the_way(server, uid)
        chunks = response.iter_raw(2**18)
        if not reads:
            server.wait_until(lambda: server.registry.num_open == 0)
        else:
            for _ in range(15):
                time.sleep(0.13)
                next(chunks)
            assert server.in_loop(lambda: server.registry.num_open) == 1
            server.in_loop(lambda: server.backend.deliver(reply(uid, "", 90, Finish.LENGTH)))
            *_, last = chunks
            assert last.endswith(b"data: [DONE]\n\n")
    assert server.chat().status_code == 200


def test_a_pipelined_request_does_not_hide_that_the_client_has_left(server: HttpServer) -> None:
    text = json.dumps(body("stall", stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    one = f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(one + one)
        receive_until(connection, b"data: ")
        uid = server.backend.requests[-1].uid
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def has_ended() -> bool:
        flood(server, uid, 1)
        return server.in_loop(lambda: server.registry.num_open == 0)

    wait_until(has_ended)
