"""A client that does not read its stream, beside one that does."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import httpx

from tests.support.server_process import OpenRequest, running, wait_until

MAX_TOKENS = 300


def test_a_stream_that_is_not_read_is_ended_and_another_one_does_not_feel_it(
    model_dir: Path, socket_dir: Path
) -> None:
    messages = [{"role": "user", "content": "go on"}]
    # Log-probabilities make more than a kilobyte of each token: the kernel takes a few thousand.
    body = {"messages": messages, "n": 3, "max_tokens": 1200, "stream": True, "ignore_eos": True}
    text = json.dumps({**body, "logprobs": True, "top_logprobs": 20})
    with running("--model", str(model_dir), tmp_dir=socket_dir, step_s=0.001) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.connect((host, int(port)))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            unread.sendall((head + text).encode())
            other = OpenRequest(server.url, stream=True, max_tokens=MAX_TOKENS)
            other.wait_for_text()
            dropped = "minisrv:dropped_streams_total 1.0"
            wait_until(lambda: dropped in httpx.get(f"{server.url}/metrics").text, 60)
            other.join()
            *_, last, done = other.events
            assert json.loads(last)["choices"][0]["finish_reason"] == "length"
            assert done == "[DONE]"
            # The connection is closed: after what the kernel holds comes no end of the reply.
            unread.settimeout(10)
            reply = b""
            try:
                while piece := unread.recv(65536):
                    reply += piece
            except ConnectionResetError:
                pass
            assert b"[DONE]" not in reply
        loads = httpx.get(f"{server.url}/v1/loads").json()["loads"][0]
        assert loads["num_open_reqs"] == 0
