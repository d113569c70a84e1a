"""The cost of a body is counted before it is parsed: exactly where it must be, in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.errors import InvalidRequestError
from minisrv.frontend.http.body import parse_json
from minisrv.frontend.http.body_size import (
    MAX_LONG_DIGITS,
    MAX_TOKEN_IDS,
    MAX_VALUES,
    PIECE_BYTES,
    BodySize,
)
from tests.support.http_server import HttpServer

COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.sampled_from('a,[]{}:"\\\n/5é😀'), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)


def count(value: Any) -> int:
    """The values inside a value; an empty array or object counts as two."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(1 + count(part) for part in parts) + (value in ([], {}))


def size_of(data: bytes, cuts: list[int]) -> BodySize:
    """Counted in pieces that end at the cuts."""
    size, start = BodySize(), 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        size.add(data[start:cut])
        start = cut
    return size


@settings(max_examples=300)
@given(VALUES, st.booleans(), st.lists(st.integers(0, 10_000), max_size=6), st.integers(0, 3))
def test_values_are_counted_in_any_pieces(
    value: Any, ascii: bool, cuts: list[int], indent: int
) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent or None)
    size = size_of(text.encode(errors="replace"), cuts)
    assert size.num_values == count(value)
    assert size.num_token_ids == size.num_long_digits == 0


@given(st.integers(9, 5000), st.sampled_from([", ", ",", " ,\n"]), st.integers(0, 10**6))
def test_integers_in_arrays_are_counted_apart(length: int, separator: str, id: int) -> None:
    ids = separator.join([str(id)] * length)
    size = size_of(f'{{"prompt":[{ids}],"x":["1,2,3,4,5,6,7,8,9,10,11"]}}'.encode(), [])
    assert size.num_token_ids == length - 1
    assert size.num_values == 4


@pytest.mark.parametrize(
    "text", ["[[7],[7],[7]]", "[[1,2],[3,4]]", '["a","b",1,true]', "[1.5,2.5]"]
)
def test_short_arrays_are_counted_as_values(text: str) -> None:
    assert size_of(text.encode(), []).num_values == count(json.loads(text))


def test_the_digits_of_long_numbers_are_counted() -> None:
    text = "[123456789012345678, 12345678901234567890, 0." + "3" * 30 + ', "' + "9" * 99 + '"]'
    assert size_of(text.encode(), []).num_long_digits == 20 + 30


LIMITS: list[tuple[str, str]] = [
    ('{"prompt":"a","x":[' + ",".join(["true"] * (MAX_VALUES + 1)) + "]}", "JSON values"),
    ('{"prompt":[' + ",".join(["[7]"] * (MAX_VALUES // 2)) + "]}", "JSON values"),
    ('{"prompt":[' + ",".join(["7"] * (MAX_TOKEN_IDS + 100)) + "]}", "integers in arrays"),
    ('{"prompt":"a","x":[' + ",".join(["9" * 4000] * 17) + "]}", "digits together"),
]


@pytest.mark.parametrize(("body", "what"), LIMITS, ids=[what for _, what in LIMITS])
def test_a_body_beyond_a_limit_is_refused_and_the_connection_goes_on(
    server: HttpServer, body: str, what: str
) -> None:
    for content in (
        body.encode(),
        (body[i : i + 9999].encode() for i in range(0, len(body), 9999)),
    ):
        response = server.http.post(COMPLETIONS, content=content, headers=JSON)
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert what in message
        limit = {"JSON": MAX_VALUES, "inte": MAX_TOKEN_IDS, "digi": MAX_LONG_DIGITS}[what[:4]]
        assert str(limit) in message
        assert server.http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_a_body_within_the_limits_is_accepted(server: HttpServer) -> None:
    values = ",".join(["true"] * (MAX_VALUES - 10))
    digits = ",".join(["9" * 4000] * 16)
    ids = ",".join(["255"] * 2000)
    text = 'a, [1], {2}: \\"3\\" \\\\ \\n' * 200_000
    for member in (f'"x":[{values}]', f'"x":[{digits}]', f'"x":[{ids}]', f'"user":"{text}"'):
        body = f'{{"prompt":"a",{member}}}'
        assert len(body) > 5000
        response = server.http.post(COMPLETIONS, content=body.encode(), headers=JSON)
        assert response.status_code == 200, response.text


def test_no_body_of_one_piece_has_too_many_values() -> None:
    assert MAX_VALUES * len("1,") == PIECE_BYTES


def test_too_many_ids_for_the_context_are_refused_before_they_are_read(server: HttpServer) -> None:
    for path, field in ((COMPLETIONS, "prompt"), ("/generate", "input_ids")):
        response = server.http.post(path, json={field: [5] * 100_000, "max_tokens": 9})
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)
        assert "(100000 in the prompt" in error["message"]
    response = server.http.post(COMPLETIONS, json={"prompt": [[5], [5] * 3000]})
    assert response.json()["error"]["param"] == "prompt.1"


FAULTY = st.sampled_from(
    [
        *" \n\x00é{}[],:\"\\u01-.e+'",
        *("true", "nul", "\\ud83d", "\\ude00", "\\u00", '"a"', '"b":', "//", "NaN", "Infinity"),
    ]
)


@settings(max_examples=1000)
@given(st.lists(FAULTY, max_size=12).map("".join))
def test_the_parser_accepts_what_python_accepts_and_is_strict(text: str) -> None:
    """Except for what is refused on purpose: NaN, Infinity, keys that repeat, lone surrogates."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key repeats"
        return dict(pairs)

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        expected = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
        json.dumps(expected, ensure_ascii=False).encode()
    except (ValueError, AssertionError):
        with pytest.raises(InvalidRequestError):
            parse_json(text.encode())
        return
    if "Infinity" in json.dumps(expected):
        return
    read = parse_json(text.encode())
    assert (read, repr(read)) == (expected, repr(expected))


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(),
    st.text("0123456789", min_size=1, max_size=40),
)
def test_numbers_are_read_as_python_reads_them(number: float, whole: int, digits: str) -> None:
    for text in (
        repr(number),
        str(whole),
        f"1{digits}",
        f"0.{digits}",
        f"1.{digits}e-{len(digits)}",
    ):
        read = parse_json(f"[{text}]".encode())
        assert repr(read) == repr(json.loads(f"[{text}]"))
