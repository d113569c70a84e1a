"""A streamed reply is read the same however the network cuts it, and its faults have names."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.bench.reply import Failure, Reply

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def event(value: Any) -> bytes:
    return b"data: %s\n\n" % json.dumps(value).encode()


def text(value: str, **fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "text": value, "finish_reason": None, **fields}]})


def delta(**fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


DONE = b"data: [DONE]\n\n"
STREAM = (
    text("a\u00e9", token_ids=[5, 6])
    + b": a comment\r\n\r\n"
    + text("")
    + text("b", token_ids=[7]).replace(b"\n", b"\r\n")
    + event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    + event({"choices": [], "usage": USAGE})
    + DONE
)


def read(*parts: bytes, status: int = 200) -> Reply:
    reply = Reply(keep_output=True)
    reply.begin(status)
    for number, part in enumerate(parts):
        reply.feed(part, float(number))
    return reply


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_where_the_bytes_are_cut_does_not_matter(cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(STREAM)]
    reply = read(*(STREAM[a:b] for a, b in pairwise(ends)))
    assert reply.end() is None
    assert (reply.text, reply.token_ids) == ("a\u00e9b", [5, 6, 7])
    assert (reply.usage, reply.finish_reason) == (USAGE, "length")
    assert len(reply.chunk_times) == 2
    assert list(reply.chunk_times) == sorted(reply.chunk_times)


def test_a_chunk_counts_at_the_time_its_last_byte_arrived() -> None:
    first, second = text("a"), text("b")
    reply = read(first[:5], first[5:] + second[:-2], second[-2:])
    assert list(reply.chunk_times) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("chunk", "has_output"),
    [
        (delta(role="assistant", content=""), False),
        (delta(content="a"), True),
        (delta(reasoning_content="a"), True),
        (delta(reasoning="a"), True),
        (delta(tool_calls=[{"index": 0, "function": {"name": "f"}}]), True),
        (delta(), False),
    ],
)
def test_only_chunks_with_output_count(chunk: bytes, has_output: bool) -> None:
    assert len(read(chunk).chunk_times) == has_output


@pytest.mark.parametrize(
    ("parts", "status", "failure"),
    [
        ([], 0, Failure("connection closed before the reply")),
        (
            [b'{"error": {"message": "the queue ', b'is full"}}'],
            503,
            Failure("status 503", "the queue is full"),
        ),
        ([b"<html>bad gateway"], 502, Failure("status 502", "<html>bad gateway")),
        ([b'{"detail": "unknown"}'], 404, Failure("status 404", "{'detail': 'unknown'}")),
        ([text("a")], 200, Failure("reply broken off")),
        ([DONE], 200, Failure("reply without output")),
        ([b'{"choices": []}'], 200, Failure("reply is not a stream of events", "{'choices': []}")),
        (
            [text("a"), event({"error": {"message": "engine died"}}), DONE],
            200,
            Failure("error in the stream", "engine died"),
        ),
    ],
)
def test_a_failure_has_a_name(parts: list[bytes], status: int, failure: Failure) -> None:
    assert read(*parts, status=status).end() == failure


def test_an_event_that_is_not_json_is_a_failure() -> None:
    failure = read(b"data: {\n\n" + DONE).end()
    assert failure is not None
    assert failure.kind == "event is not JSON"


def test_usage_in_another_form_is_left_out() -> None:
    reply = read(text("a"), event({"choices": [], "usage": "7 tokens"}), DONE)
    assert reply.end() is None
    assert reply.usage == {}
