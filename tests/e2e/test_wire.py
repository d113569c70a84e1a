"""The check of recorded replies fails for a reply that does not match the client's types."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest

from tests.support.questions import ask
from tests.support.recording import Exchange, Recorder
from tests.support.wire import check_exchange


def test_a_whole_reply_that_does_not_fit_fails(client: openai.OpenAI, recorder: Recorder) -> None:
    client.chat.completions.create(**ask("Hi"))
    (exchange,) = recorder.exchanges
    value = json.loads(exchange.body)
    changes: list[dict[str, Any]] = [{"created": "1"}, {"id": None}, {"object": "x"}, {"more": 1}]
    for change in changes:
        changed = bytearray(json.dumps(value | change).encode())
        with pytest.raises((AssertionError, pydantic.ValidationError)):
            check_exchange(Exchange(exchange.path, 200, streamed=False, body=changed))
    value["usage"]["seconds"] = 1
    changed = bytearray(json.dumps(value).encode())
    with pytest.raises(AssertionError, match=r"CompletionUsage\.seconds"):
        check_exchange(Exchange(exchange.path, 200, streamed=False, body=changed))


def test_each_chunk_of_a_stream_is_checked(client: openai.OpenAI, recorder: Recorder) -> None:
    num_chunks = len(list(client.chat.completions.create(**ask("Hi"), stream=True)))
    (exchange,) = recorder.exchanges
    assert len(exchange.events()) == num_chunks + 1
    parts = bytes(exchange.body).split(b'"index":0')
    assert len(parts) == num_chunks + 1
    for i in range(1, num_chunks + 1):
        body = bytearray(b'"index":0'.join(parts[:i]) + b'"index":"0"')
        body += b'"index":0'.join(parts[i:])
        with pytest.raises(pydantic.ValidationError):
            check_exchange(Exchange(exchange.path, 200, streamed=True, body=body))
