"""Refusals under /v1/messages: each in Anthropic's form, and it names the field."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.frontend.apis.anthropic.fields import MESSAGES_FIELDS
from minisrv.frontend.fields.table import Treatment
from tests.support.anthropic_bodies import COUNT, HI, PATH, TOOL, error_of, result, send, turn, use
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel

REJECTED = [n for n, f in MESSAGES_FIELDS.items() if f.treatment is Treatment.REJECTED]


@pytest.fixture(scope="module")
def hermes() -> Iterator[HttpServer]:
    backend = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    with serve(make_backend=backend) as running:
        yield running


@pytest.mark.parametrize("name", REJECTED)
def test_an_unsupported_field_is_refused_by_name(hermes: HttpServer, name: str) -> None:
    response = send(hermes, **{name: ["anything", 5]})
    assert response.status_code == 400
    assert error_of(response).startswith(f"{name} is not supported")


def tools(**fields: Any) -> dict[str, Any]:
    return {"tools": [{**TOOL, **fields}]}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is missing"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": "9"}, "max_tokens is"),
    ({"messages": None}, "messages is missing"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role is"),
    ({"messages": [turn("user")]}, "messages.0.content is empty"),
    ({"messages": [turn("user", {"text": ""})]}, "messages.0.content.0.type is missing"),
    ({"messages": [turn("user", {"type": "image"})]}, 'messages.0.content.0.type is "image"'),
    ({"messages": [turn("user", {"type": "document"})]}, 'messages.0.content.0.*"document"'),
    ({"messages": [turn("user", {"type": "text"})]}, "messages.0.content.0.text is missing"),
    ({"messages": [turn("user", use())]}, 'messages.0.content.0.type is "tool_use"'),
    ({"messages": [turn("user", {"type": "tool_result"})]}, "messages.0.content.0.tool_use_id"),
    (
        {"messages": [turn("user", result(content=[{"type": "image"}]))]},
        'messages.0.content.0.content.0.type is "image"',
    ),
    ({"messages": [turn("user", result(is_error=1))]}, "messages.0.content.0.is_error"),
    ({"messages": [turn("assistant", result())]}, 'messages.0.content.0.type is "tool_result"'),
    (
        {"messages": [turn("assistant", {"type": "tool_use", "id": "a", "name": "f"})]},
        "messages.0.content.0.input is missing",
    ),
    (
        {"messages": [turn("assistant", {"type": "server_tool_use"})]},
        'messages.0.content.0.type is "server_tool_use"',
    ),
    ({"messages": [*HI, turn("assistant", "The", use())]}, "messages.1.content ends with a call"),
    ({"system": 5}, "system is 5"),
    ({"system": [{"type": "image"}]}, 'system.0.type is "image"'),
    ({"temperature": 3}, "temperature is 3"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_k": -2}, "top_k is -2"),
    ({"stop_sequences": "x"}, "stop_sequences is"),
    ({"stop_sequences": [""]}, "stop_sequences must contain"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences has 17"),
    ({"stop_sequences": ["x" * 300]}, "stop_sequences: a stop string has 300"),
    ({"stream": "yes"}, "stream is"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.*web_search_2"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type .*bash_20250124"),
    ({"tools": [{"name": "add"}]}, "tools.0.input_schema is missing"),
    (tools(name="a b"), "tools.0.name is 'a b'"),
    (tools(defer_loading=True), "tools.0.defer_loading"),
    (tools(allowed_callers=["code_execution_20260120"]), "tools.0.allowed_callers"),
    ({"tools": [TOOL, TOOL]}, "tools.1.name repeats the name add"),
    ({"tools": [TOOL] * 129}, "tools has 129"),
    ({"tool_choice": {"type": "any"}}, "tool_choice requires a call, but there are no tools"),
    ({**tools(), "tool_choice": "any"}, "tool_choice is"),
    ({**tools(), "tool_choice": {"type": "some"}}, "tool_choice.type is"),
    ({**tools(), "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
    ({**tools(), "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name is 'f'"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type is"),
    ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "thinking.budget_tokens"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort is"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    (
        {
            **tools(),
            "tool_choice": {"type": "any"},
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
        },
        "tool_choice requires a call.*output_config.format",
    ),
    ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.e.*0"),
    (
        {"chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs.messages is set by the server",
    ),
    ({"request_id": "a b"}, "request_id must be"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_a_wrong_field_is_named(hermes: HttpServer, fields: dict[str, Any], words: str) -> None:
    response = send(hermes, **fields)
    assert response.status_code == 400, response.text
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(error_of(response))


@pytest.mark.parametrize(("fields", "words"), [({"messages": []}, "messages"), ({"stream": 1}, "")])
def test_a_count_has_errors_and_warnings_of_the_same_form(
    hermes: HttpServer, fields: dict[str, Any], words: str
) -> None:
    response = hermes.http.post(COUNT, json={"messages": HI, **fields})
    if words:
        assert words in error_of(response)
    else:
        assert "stream" in response.headers["x-minisrv-warnings"]


def test_errors_have_the_kinds_of_the_api(server: HttpServer) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError, match="served: 'org/tiny'") as caught:
            client.messages.create(model="other", max_tokens=5, messages=HI)
        assert caught.value.request_id
        error_of(caught.value.response, "not_found_error")
        turns: Any = [{"role": "user", "content": "refuse"}]
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
            client.messages.create(model="", max_tokens=5, messages=turns)
    error_of(server.http.post(f"{PATH}/batches", json={}), "not_found_error")
    error_of(server.http.get(PATH))
    error_of(server.http.post(PATH, content=b"{", headers={"Content-Type": "application/json"}))
    assert server.http.post(PATH, content=b"{}").status_code == 415
    bug = send(server, messages=[{"role": "user", "content": "break"}])
    assert error_of(bug, "api_error") == "broken"


def test_keys_limits_and_the_start_answer_in_the_same_form() -> None:
    with serve(api_key=("secret",), max_body_bytes=1024) as server:
        for path in (PATH, COUNT, f"{PATH}/batches"):
            error_of(server.http.post(path, json={}), "authentication_error")
        with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
            assert client.messages.create(model="", max_tokens=5, messages=HI).content
            with pytest.raises(anthropic.APIStatusError) as caught:
                client.messages.create(model="", max_tokens=5, messages=HI, system="x" * 1024)
        body: Any = caught.value.body
        assert (caught.value.status_code, body["error"]["type"]) == (413, "request_too_large")
    with serve(ready=False) as server:
        response = send(server)
        error_of(response, "overloaded_error")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    with serve() as server:
        assert "type" not in server.chat(model="other").json()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["hi", "user", "assistant", "text", "tool_use", "tool_result", "thinking"])
    | st.sampled_from(["auto", "any", "tool", "enabled", "json_schema", "add", "custom"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=4)
        | st.dictionaries(st.sampled_from(["id", "name", "input", "input_schema"]), inner)
        | st.dictionaries(st.sampled_from(["type", "edits", "format", "schema", "keep"]), inner)
    ),
    max_leaves=12,
)


@given(
    path=st.sampled_from([PATH, COUNT]),
    body=st.dictionaries(st.sampled_from(sorted(MESSAGES_FIELDS)), VALUES, max_size=4),
    blocks=st.lists(st.fixed_dictionaries({"type": st.just("tool_result")}) | VALUES, max_size=3),
    own=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_any_json_gets_a_2xx_or_a_4xx(
    hermes: HttpServer, path: str, body: dict[str, Any], blocks: list[Any], own: bool
) -> None:
    hermes.backend.text = "Hello"  # type: ignore[attr-defined]
    messages = [*HI, {"role": "assistant", "content": blocks}] if own else HI
    response = hermes.http.post(path, json={"messages": messages, "max_tokens": 9, **body})
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code == 400:
        error_of(response)
