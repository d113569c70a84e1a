"""Malformed requests get a 4xx in OpenAI's form that names the field; the server goes on."""

import json
import math
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.frontend.apis.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, ROLES
from minisrv.frontend.http.error_format import ERROR_SCHEMA
from tests.support.http_server import HttpServer, serve
from tests.support.refusals import json_with_infinity
from tests.support.scripted_backend import TEXT

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi", **fields}]}


def error_of(response: Any) -> dict[str, Any]:
    """The error object, with its four keys and nothing beside it."""
    body = response.json()
    assert list(body) == ["error"], body
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    assert response.headers["content-type"] == "application/json"
    return body["error"]


CHAT_CASES: list[tuple[dict[str, Any], str | None]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": {"role": "user"}}, "messages"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    (message(role="robot"), "messages.0.role"),
    (message(role=1), "messages.0.role"),
    (message(content=5), "messages.0.content"),
    (message(content=None), "messages.0.content"),
    (message(content=["hi"]), "messages.0.content.0"),
    (message(content=[{"text": "hi"}]), "messages.0.content.0.type"),
    (message(content=[{"type": "text"}]), "messages.0.content.0.text"),
    (
        message(content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]),
        "messages.0.content.1.type",
    ),
    (message(content=[{"type": "refusal", "refusal": "no"}]), "messages.0.content.0.type"),
    (message(tool_calls=[{"id": "1"}]), "messages.0.tool_calls.0.function"),
    (message(tool_calls=[{"id": "1", "function": {}}]), "messages.0.tool_calls.0.function"),
    (message(tool_calls=5), "messages.0.tool_calls"),
    (message(extra=math.inf), "messages.0.extra"),
    (message(extra={"deep": ["a", {}, -math.inf]}), "messages.0.extra.deep.2"),
    ({"messages": HI, "chat_template_kwargs": {"a": math.inf}}, "chat_template_kwargs.a"),
    ({"messages": HI, "prompt": "hi"}, "messages"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt.0"),
    ({"prompt": 5}, "prompt"),
]
FIELD_CASES: list[tuple[str, Any]] = [
    ("model", 5),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", -0.1),
    ("temperature", 2.5),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", 2**40),
    ("min_p", -1),
    ("seed", "1"),
    ("seed", 1.0),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", "5"),
    ("max_tokens", True),
    ("max_tokens", 2**62),
    ("min_tokens", -1),
    ("n", 0),
    ("n", 129),
    ("n", "2"),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", 5),
    ("stop", ["x"] * 17),
    ("stop", "x" * 300),
    ("stop_token_ids", [1, 1000]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", 5),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("repetition_penalty", 2.5),
    ("logit_bias", [5]),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"5": "much"}),
    ("logit_bias", {"1000": 1}),
    ("stream", "true"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("stream_options", True),
    ("ignore_eos", 1),
    ("skip_special_tokens", "no"),
]
BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"hi"',
    b"5",
    b'{"prompt": "a", }',
    b'{"prompt": "a"} x',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "user": NaN}',
    b'{"prompt": "a", "user": [-Infinity]}',
    b'{"prompt": "a", "user": 1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "seed": 9223372036854775808}',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a\\udc00b"}',
    b'{"prompt": "a", "\\ud800": 1}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\xff"}',
    '{"prompt": "a"}'.encode("utf-16"),
    b'\xef\xbb\xbf{"prompt": "a"}',
    b'{"prompt": "a\x00"}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "a", "x": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"prompt": "a", "x": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}",
]


def still_answers(server: HttpServer) -> None:
    assert server.chat().json()["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize(("body", "param"), CHAT_CASES, ids=str)
def test_a_malformed_chat_names_the_field(
    server: HttpServer, body: dict[str, Any], param: str | None
) -> None:
    response = server.http.post(CHAT, content=json_with_infinity(body), headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    still_answers(server)


@pytest.mark.parametrize(("name", "value"), FIELD_CASES, ids=str)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_wrong_value_names_the_field(
    server: HttpServer, path: str, name: str, value: Any
) -> None:
    body = {"prompt": "a", name: value}
    response = server.http.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == name
    still_answers(server)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
def test_a_body_that_is_not_a_json_object_is_refused(server: HttpServer, body: bytes) -> None:
    response = server.http.post(COMPLETIONS, content=body, headers=JSON)
    assert response.status_code == 400
    error_of(response)
    still_answers(server)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([[]], "prompt.0"),
        ([1, "a"], "prompt.0"),
        ([[1], "a"], "prompt.0"),
        ([-1], "prompt"),
        ([1000], "prompt"),
        ([[1], [2**40]], "prompt.1"),
        ([True], "prompt.0"),
        ({"text": "a"}, "prompt"),
        (None, "prompt"),
    ],
    ids=str,
)
def test_a_malformed_prompt_is_named(server: HttpServer, prompt: Any, param: str) -> None:
    response = server.http.post(COMPLETIONS, json={"prompt": prompt})
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    still_answers(server)


def test_an_unknown_model_is_404_and_lists_the_served_one(server: HttpServer) -> None:
    with pytest.raises(openai.NotFoundError, match="org/tiny") as raised:
        server.openai.chat.completions.create(model="gpt-4", messages=HI)
    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"
    for model in ("", None):
        assert server.chat(model=model).json()["model"] == "org/tiny"


def test_a_body_over_the_limit_is_413(server: HttpServer) -> None:
    response = server.http.post(COMPLETIONS, json={"prompt": "x" * 10_000_000})
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    still_answers(server)


def test_a_body_of_unknown_length_is_cut_off_at_the_limit() -> None:
    with serve(max_body_bytes=2000) as server:
        chunks = (b"x" * 500 for _ in range(20))
        response = server.http.post(COMPLETIONS, content=chunks, headers=JSON)
        assert response.status_code == 413
        still_answers(server)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(server: HttpServer, kind: str) -> None:
    response = server.http.post(
        COMPLETIONS, content=b'{"prompt": "a"}', headers={"Content-Type": kind}
    )
    assert response.status_code == 415
    error_of(response)


def test_a_coding_of_the_body_is_415_and_named(server: HttpServer) -> None:
    for coding, status in [("deflate", 415), ("br, gzip", 415), ("identity", 200), ("", 200)]:
        headers = {**JSON, "Content-Encoding": coding}
        response = server.http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
        assert response.status_code == status
        if status == 415:
            assert f"'{coding}'" in error_of(response)["message"]


def test_max_completion_tokens_goes_before_max_tokens(server: HttpServer) -> None:
    assert server.chat(max_tokens=5, max_completion_tokens=6).status_code == 200
    assert server.backend.requests[-1].sampling.max_tokens == 6
    for fields in ({}, {"max_tokens": 5}):
        error = error_of(server.chat(max_completion_tokens=0, **fields))
        assert error["param"] == "max_completion_tokens"
        assert error["message"].startswith("max_completion_tokens is 0;")


@pytest.mark.parametrize(
    ("bias", "param", "message"),
    [
        ({"5": None}, "logit_bias.5", "logit_bias.5 is null; it must be a number"),
        ({"5": "x"}, "logit_bias.5", "logit_bias.5 is 'x'; it must be a number"),
        ({"5": 1, "05": 2}, "logit_bias", "logit_bias has the key '05'"),
    ],
    ids=str,
)
def test_a_wrong_bias_names_its_token(
    server: HttpServer, bias: dict[str, Any], param: str, message: str
) -> None:
    response = server.chat(logit_bias=bias)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert error_of(response)["message"].startswith(message)


FORMS = "a string, an array of strings, an array of integers or an array of arrays of integers"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (COMPLETIONS, {"prompt": [True]}, f"prompt.0 is true; prompt must be {FORMS}"),
        (COMPLETIONS, {"prompt": [74, "a"]}, f"prompt.0 is 74; prompt must be {FORMS}"),
        (COMPLETIONS, {"prompt": 5}, f"prompt is 5; it must be {FORMS}"),
        (CHAT, {"messages": HI, "tool_choice": "x"}, "tool_choice is 'x'; it must be none, auto"),
        (
            CHAT,
            {"messages": HI, "tool_choice": {"type": "none"}},
            'tool_choice.type is "none"; it must be function',
        ),
        (CHAT, {"messages": HI, "modalities": ["audio"]}, '(accepted: ["text"], null)'),
        (
            CHAT,
            {"messages": HI, "stop_token_ids": [-1]},
            "stop_token_ids holds -1; token ids go",
        ),
        (
            CHAT,
            {"messages": HI, "logit_bias": {"1000": 1}},
            "logit_bias holds 1000; token ids go",
        ),
        ("/tokenize", {}, "send prompt or messages"),
        ("/apply_template", {}, "messages is missing"),
    ],
    ids=str,
)
def test_a_refusal_says_what_is_wrong(
    server: HttpServer, path: str, body: dict[str, Any], message: str
) -> None:
    response = server.http.post(path, json=body)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_a_seed_may_be_any_integer_of_64_bits(server: HttpServer, seed: int) -> None:
    assert server.chat(seed=seed).status_code == 200
    assert server.backend.requests[-1].sampling.seed == seed


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63, 10**400])
def test_a_wider_integer_names_its_field(server: HttpServer, seed: int) -> None:
    response = server.http.post(COMPLETIONS, json={"prompt": "a", "seed": seed})
    assert response.status_code == 400
    assert error_of(response)["param"] == "seed"


def test_more_choices_than_the_server_may_ever_hold_are_refused() -> None:
    with serve(max_open_requests=8) as server:
        response = server.http.post(COMPLETIONS, json={"prompt": ["a", "b", "c"], "n": 3})
        assert response.status_code == 400
        assert error_of(response)["param"] == "prompt"
        assert server.http.post(COMPLETIONS, json={"prompt": "a", "n": 8}).status_code == 200


def test_the_error_schema_of_the_docs_names_the_four_keys() -> None:
    required = ERROR_SCHEMA["properties"]["error"]["required"]
    assert sorted(required) == ["code", "message", "param", "type"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["hi", "user", "text", *ROLES]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)
NAMES = st.sampled_from(sorted(CHAT_FIELDS.keys() | COMPLETION_FIELDS.keys())) | st.text(max_size=6)


@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    base=st.sampled_from([{}, {"prompt": "hi"}, {"messages": HI}]),
    body=VALUES | st.dictionaries(NAMES, VALUES, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_any_json_gets_a_2xx_or_a_4xx(
    server: HttpServer, path: str, base: dict[str, Any], body: Any
) -> None:
    if isinstance(body, dict):
        body = {**base, **body}
    response = server.http.post(path, content=json.dumps(body), headers=JSON)
    assert 200 <= response.status_code < 300 or 400 <= response.status_code < 500, response.text
    if response.status_code >= 400:
        error_of(response)


@given(body=st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
def test_any_bytes_get_a_4xx(server: HttpServer, body: bytes) -> None:
    assert server.http.post(CHAT, content=body, headers=JSON).status_code == 400
