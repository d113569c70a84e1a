"""JSON and server-sent events."""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

# One encoder for all chunks: json.dumps with options would build one per call.
encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def json_bytes(value: dict[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return encode_json(value).encode()


def sse(value: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + json_bytes(value) + b"\n\n"


def named_sse(event: dict[str, Any]) -> bytes:
    """A server-sent event under the name of its `type`."""
    return f"event: {event['type']}\n".encode() + sse(event)
