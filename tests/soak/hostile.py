"""What a hostile input is, and what the server may answer."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.soak.raw_http import Reply

# The limits that docs/api.md states: the code of their 503, or Anthropic's type.
STATED_LIMITS = {"server_overloaded", "request_timeout", "overloaded_error"}
# Parts of internal text that no error may carry to a client.
INTERNAL_TEXT = ("Traceback", "object at 0x", "minisrv.", "/python/", "NoneType", "Errno")


@dataclass(frozen=True, slots=True)
class Hostile:
    """An input on a connection of its own.

    pieces: written one after another, with a short pause between them.
    num_replies: how many requests must be answered. None: it is not a request that can be
    counted; whatever is answered must be in order, and the client leaves soon.
    for_head: whether the one reply answers HEAD and so has no body.
    """

    kind: str
    pieces: tuple[bytes, ...]
    num_replies: int | None = 1
    for_head: bool = False

    def __str__(self) -> str:
        data = b"".join(self.pieces)
        shown = data if len(data) <= 1500 else data[:1000] + b" ... " + data[-400:]
        return f"{self.kind}, {len(data)} bytes in {len(self.pieces)} pieces: {shown!r}"


def fault_of(reply: Reply, *, has_body: bool = True) -> str | None:
    """What is wrong with a reply, whatever the input was; None if nothing is."""
    if reply.status == 503:
        if not reply.headers.get("retry-after", "").isdecimal():
            return "a 503 without Retry-After"
        if has_body and not STATED_LIMITS & set(_error_of(reply).values()):
            return f"a 503 of no stated limit: {reply.body[:300]!r}"
    elif not 200 <= reply.status < 500:
        return f"status {reply.status}: {reply.body[:500]!r}"
    if not has_body:
        return None
    if reply.status >= 400:
        return _fault_of_refusal(reply)
    if reply.is_stream:
        return _fault_of_stream(reply)
    if reply.headers.get("content-type") == "application/json":
        json.loads(reply.body)
    return None


def _error_of(reply: Reply) -> dict[str, str | None]:
    error = json.loads(reply.body)["error"]
    assert isinstance(error, dict)
    return error


def _fault_of_refusal(reply: Reply) -> str | None:
    try:
        sentence = _error_of(reply)["message"]
    except (ValueError, KeyError, TypeError, AssertionError):
        return f"a {reply.status} without an error object: {reply.body[:300]!r}"
    if not sentence or any(text in sentence for text in INTERNAL_TEXT):
        return f"a {reply.status} with the sentence {sentence!r}"
    return None


def _fault_of_stream(reply: Reply) -> str | None:
    """A stream ends as its API says; an error in it is one of the client's or of a limit."""
    events = reply.events
    if not events:
        return "a stream without an event"
    for event in events[:-1] if events[-1] == "[DONE]" else events:
        if '"error"' in event and '"internal_error"' in event:
            return f"an internal error in a stream: {event[:300]}"
    last = events[-1]
    ends = ("[DONE]", "message_stop", "response.completed", "response.incomplete", "error")
    if not any(end in last for end in ends) and "finish_reason" not in last:
        return f"a stream that ends with {last[:300]}"
    return None
