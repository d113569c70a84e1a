"""Bodies that clients compress: read as if they were plain, and bounded as those are."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.errors import InvalidRequestError
from minisrv.frontend.http.gzip_body import GzipBody
from tests.support.http_server import HttpServer, serve

COMPLETIONS = "/v1/completions"
HEADERS = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
BODY = json.dumps({"prompt": "hi \u4f60\u597d", "max_tokens": 3}).encode()


@pytest.fixture(scope="module")
def small() -> Iterator[HttpServer]:
    with serve(max_body_bytes=100_000) as server:
        yield server


def post(server: HttpServer, data: bytes, coding: str = "gzip", **options: bool) -> httpx.Response:
    content = (data[i : i + 7] for i in range(0, len(data), 7)) if options.get("chunked") else data
    headers = {**HEADERS, "Content-Encoding": coding}
    return server.http.post(COMPLETIONS, content=content, headers=headers)


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_compressed_body_is_read(small: HttpServer, coding: str, chunked: bool) -> None:
    assert post(small, gzip.compress(BODY), coding, chunked=chunked).status_code == 200
    assert small.backend.requests[-1].prompt == "hi \u4f60\u597d"


@given(st.binary(max_size=300), st.integers(0, 9), st.lists(st.integers(0, 400), max_size=5))
def test_it_is_inflated_in_any_pieces(data: bytes, level: int, cuts: list[int]) -> None:
    sent, body, read, start = gzip.compress(data * 50, level), GzipBody(), b"", 0
    for cut in [*sorted(min(cut, len(sent)) for cut in cuts), len(sent)]:
        read += b"".join(body.inflate(sent[start:cut]))
        start = cut
    body.end()
    assert read == data * 50


def test_what_inflates_beyond_the_limit_is_refused_before_it_is_inflated(small: HttpServer) -> None:
    bomb = gzip.compress(b'{"prompt": "' + b"a" * 300_000_000, 9)
    assert len(bomb) > 100_000
    for data in (bomb, bomb[:90_000]):
        began = time.process_time()
        response = post(small, data)
        assert time.process_time() - began < 0.5
        assert response.status_code == 413
    with serve() as server:
        began = time.process_time()
        assert post(server, bomb).status_code == 413
        assert time.process_time() - began < 1


def test_the_limits_on_values_hold_for_what_was_inflated(server: HttpServer) -> None:
    values = b'{"prompt": [' + b'"",' * 40_000 + b'""]}'
    response = post(server, gzip.compress(values))
    assert response.status_code == 400
    assert "JSON values" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (BODY, "incorrect header check"),
        (zlib.compress(BODY), "incorrect header check"),
        (gzip.compress(BODY)[:-3], "it breaks off"),
        (gzip.compress(BODY) + b"more", "it goes on behind its end"),
        (gzip.compress(BODY) * 2, "it goes on behind its end"),
        (gzip.compress(BODY)[:-8] + bytes(8), "incorrect data check"),
    ],
    ids=["plain", "zlib", "short", "more", "two members", "checksum"],
)
def test_what_is_not_one_gzip_stream_is_refused(
    small: HttpServer, data: bytes, problem: str
) -> None:
    response = post(small, data)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.startswith("the body is not gzip, as its Content-Encoding says")
    assert problem in message


def test_an_empty_body_that_may_be_missing_is_accepted(small: HttpServer) -> None:
    headers = {"Content-Encoding": "gzip"}
    assert small.http.post("/flush_cache", headers=headers).status_code != 400
    with pytest.raises(InvalidRequestError, match="it breaks off"):
        GzipBody().end()
