"""The smallest event-stream server: what bare uvicorn reaches, without routes or checks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any


def _frame(delta: dict[str, str]) -> bytes:
    chunk = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "demo",
        "system_fingerprint": "minisrv-0.1.0-01234567",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}],
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


ROLE = _frame({"role": "assistant", "content": ""})
FRAME = _frame({"content": " word"})
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def app(
    scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Send
) -> None:
    """Send `max_tokens` chunks, one every `seed` microseconds, like the other servers here."""
    assert scope["type"] == "http"
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if body:
        fields = json.loads(body)
        await _stream(send, fields["seed"] * 1e-6, fields["max_tokens"])
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _stream(send: Send, period_s: float, count: int) -> None:
    due = time.perf_counter()
    await send({"type": "http.response.body", "body": ROLE, "more_body": True})
    for _ in range(count):
        due = max(due + period_s, time.perf_counter() - period_s)
        await asyncio.sleep(due - time.perf_counter())
        await send({"type": "http.response.body", "body": FRAME, "more_body": True})
