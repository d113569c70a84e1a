"""What is done with each field of /v1/messages: its effect, or the refusal that names it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from anthropic.types.shared import ErrorResponse
from http_server import HttpServer, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from played_model import TEMPLATES, PlayedModel

from minisrv.frontend.anthropic_messages.fields import COUNT_FIELDS, MESSAGES_FIELDS
from minisrv.frontend.openai_types import Treatment

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {"name": "add", "input_schema": {"type": "object"}}
TIME: dict[str, Any] = {"name": "get_time", "input_schema": {"type": "object"}}
UNSUPPORTED = [n for n, f in MESSAGES_FIELDS.items() if f.treatment is Treatment.UNSUPPORTED]
HARMLESS = [n for n, f in MESSAGES_FIELDS.items() if f.treatment is Treatment.HARMLESS]


@pytest.fixture(scope="module")
def hermes() -> Iterator[HttpServer]:
    backend = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    with serve(make_backend=backend) as running:
        yield running


@pytest.fixture(scope="module")
def plain() -> Iterator[HttpServer]:
    backend = functools.partial(PlayedModel, template=TEMPLATES["plain"])
    with serve(make_backend=backend) as running:
        yield running


def send(server: HttpServer, **body: Any) -> Any:
    return server.http.post(PATH, json={"messages": HI, "max_tokens": 9, **body})


def prompt(server: HttpServer, *messages: Any, **body: Any) -> str:
    """What the model is shown for these messages."""
    response = send(server, messages=list(messages), **body)
    assert response.status_code == 200, response.text
    text: str = server.backend.prompts[-1]  # type: ignore[attr-defined]
    return text


def turn(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": [text(b) if isinstance(b, str) else b for b in blocks]}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


def use(id: str = "a", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": "add", "input": arguments}


def result(id: str = "a", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, **fields}


def error_of(response: Any, kind: str = "invalid_request_error") -> str:
    """The message of an error, checked with the package's own type."""
    error = ErrorResponse.model_validate_json(response.content, strict=True)
    assert error.error.type == kind
    assert not error.model_extra
    assert (error.error.model_extra or {}).keys() <= {"details"}
    assert error.request_id == response.headers["request-id"] == response.headers["x-request-id"]
    return error.error.message


def test_every_field_of_the_client_is_in_the_tables() -> None:
    for module in (message_create_params, beta_create_params):
        assert module.MessageCreateParamsBase.__annotations__.keys() <= MESSAGES_FIELDS.keys()
    count = message_count_tokens_params.MessageCountTokensParams.__annotations__.keys()
    assert count <= COUNT_FIELDS.keys()


def test_the_page_has_every_field_and_no_other() -> None:
    page = Path(__file__).parents[2] / "docs" / "api.md"
    section = page.read_text().split("\n## Anthropic's messages\n")[1].split("\n## ")[0]
    names = {
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert names - {"standard"} == MESSAGES_FIELDS.keys()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_field_is_refused_by_name(hermes: HttpServer, name: str) -> None:
    response = send(hermes, **{name: ["anything", 5]})
    assert response.status_code == 400
    assert error_of(response).startswith(f"{name} is not supported")


def test_harmless_fields_change_nothing(hermes: HttpServer) -> None:
    bare = prompt(hermes, *HI)
    body = {name: {"any": [1]} for name in HARMLESS}
    assert prompt(hermes, *HI, **body) == bare
    assert "x-minisrv-warnings" not in send(hermes, **body).headers


def test_a_null_and_a_neutral_value_never_fail(hermes: HttpServer) -> None:
    nulls = dict.fromkeys(MESSAGES_FIELDS) | {"messages": HI, "max_tokens": 9}
    assert send(hermes, **nulls).status_code == 200
    for name, field in MESSAGES_FIELDS.items():
        for neutral in field.neutral:
            assert send(hermes, **{name: neutral}).status_code == 200


def test_an_unknown_field_is_told_of_or_refused() -> None:
    with serve() as server:
        assert "made_up" in send(server, made_up=1).headers["x-minisrv-warnings"]
    with serve(strict_params=True) as server:
        assert "made_up" in error_of(send(server, made_up=1))


def test_a_thinking_budget_is_told_to_be_no_limit(hermes: HttpServer) -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}
    response = send(hermes, thinking=thinking, made_up=1)
    told = response.headers["x-minisrv-warnings"]
    assert "made_up; thinking.budget_tokens is no limit" in told


def test_sampling_fields_reach_the_sampler(server: HttpServer) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3}
    fields |= {"min_tokens": 2, "ignore_eos": True, "stop_token_ids": [5], "max_tokens": 8}
    fields |= {"presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    assert send(server, **fields, stop_sequences=["x"], logit_bias={"7": 2}).status_code == 200
    sampling = server.backend.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields | {"stop_token_ids": (5,)}
    assert (sampling.stop, sampling.logit_bias[0].token_id) == (("x",), 7)
    send(server)
    sampling = server.backend.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.95)


@pytest.mark.parametrize("system", ["Be brief.", [text("Be "), text("brief.")]])
def test_the_system_prompt_is_the_first_message(hermes: HttpServer, system: Any) -> None:
    assert prompt(hermes, *HI, system=system) == "<|system|>Be brief.<|user|>hi<|assistant|>"


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        ([turn("user", "a", "b")], "<|user|>ab"),
        ([*HI, *HI], "<|user|>hi\n\nhi"),
        ([*HI, turn("system", "s"), *HI], "<|user|>hi<|system|>s<|user|>hi"),
        (
            [*HI, turn("assistant", "x"), turn("assistant", use(), use("b", c=1)), *HI],
            '<|user|>hi<|assistant|>x CALL add {} CALL add {"c": 1}<|user|>hi',
        ),
        (
            [
                *HI,
                turn(
                    "assistant",
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "redacted_thinking", "data": "xxxx"},
                    "A",
                ),
                *HI,
            ],
            "<|user|>hi<|assistant|><think>hm</think>A<|user|>hi",
        ),
        (
            [turn("user", "p", result(content="1"), result("b"), "q", result(content=[text("2")]))],
            "<|user|>p<|tool|>1<|tool|><|user|>q<|tool|>2",
        ),
        (
            [turn("user", result(content="no", is_error=True), result(is_error=True))],
            "<|tool|>Error: no<|tool|>Error",
        ),
    ],
)
def test_turns_become_messages(hermes: HttpServer, messages: list[Any], shown: str) -> None:
    assert prompt(hermes, *messages) == f"{shown}<|assistant|>"


def test_the_reply_goes_on_with_a_last_turn_of_the_assistant(hermes: HttpServer) -> None:
    begun = [*HI, {"role": "assistant", "content": "The best is ("}]
    shown = prompt(hermes, *begun)
    assert shown == "<|user|>hi<|assistant|>The best is ("
    counted = hermes.http.post(COUNT, json={"messages": begun}).json()["input_tokens"]
    assert send(hermes, messages=begun).json()["usage"]["input_tokens"] == counted


def test_a_salt_keeps_cached_prompts_apart(server: HttpServer) -> None:
    send(server, cache_salt="mine")
    assert server.backend.requests[-1].cache_salt == "mine"


def test_a_result_has_id_and_name_of_its_call(server: HttpServer) -> None:
    results = turn("user", result(content="1"), result("other", content="2"))
    send(server, messages=[*HI, turn("assistant", use(a=1)), results])
    *_, first, second = server.backend.requests[-1].messages or ()
    assert first == {"role": "tool", "tool_call_id": "a", "name": "add", "content": "1"}
    assert second == {"role": "tool", "tool_call_id": "other", "content": "2"}


def test_the_template_sees_the_tools_as_functions(hermes: HttpServer) -> None:
    tool = TOOL | {"description": "Adds.", "input_examples": [{"a": 1}], "type": "custom"}
    tool |= {"strict": True, "eager_input_streaming": True, "allowed_callers": ["direct"]}
    shown = prompt(hermes, *HI, tools=[tool])
    assert (
        '{"type": "function", "function": {"name": "add", "description": "Adds.", '
        '"parameters": {"type": "object", "examples": [{"a": 1}]}}}'
    ) in shown
    choice = {"type": "any"}
    assert send(hermes, tools=[tool], tool_choice=choice).status_code == 200
    assert "add" not in prompt(hermes, *HI, tools=[tool], tool_choice={"type": "none"})
    assert prompt(hermes, *HI, tools=[]) == prompt(hermes, *HI)


@pytest.mark.parametrize(
    ("choice", "names", "several"),
    [
        ({"type": "any"}, ["add", "get_time"], True),
        ({"type": "tool", "name": "add"}, ["add"], True),
        ({"type": "any", "disable_parallel_tool_use": True}, ["add", "get_time"], False),
        ({"type": "auto"}, [], True),
    ],
)
def test_a_call_that_must_be_made_is_held_to_by_a_grammar(
    hermes: HttpServer, choice: Any, names: list[str], several: bool
) -> None:
    send(hermes, tools=[TOOL, TIME], tool_choice=choice)
    grammar = hermes.backend.grammars[-1]  # type: ignore[attr-defined]
    if not names:
        assert grammar is None
        return
    assert [name for name in ("add", "get_time") if name in grammar.text] == names
    assert ("*" in grammar.text.splitlines()[0]) == several


def test_without_parallel_calls_the_first_ends_the_reply(hermes: HttpServer) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    hermes.backend.text = call * 2  # type: ignore[attr-defined]
    for choice, calls in (({}, 2), ({"disable_parallel_tool_use": True}, 1)):
        body = {"tools": [TOOL], "tool_choice": {"type": "auto", **choice}, "max_tokens": 900}
        assert len(send(hermes, **body).json()["content"]) == calls


OPENS = "<|user|>hi<|assistant|>"
NO_THOUGHT = f"{OPENS}<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"thinking": {"type": "disabled"}}, NO_THOUGHT),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, OPENS),
        ({"thinking": {"type": "adaptive"}}, OPENS),
        ({"output_config": {"effort": "high"}}, f"{OPENS}<think>\n"),
        ({"output_config": {"effort": "low"}}, OPENS),
        ({"chat_template_kwargs": {"enable_thinking": False}}, NO_THOUGHT),
        (
            {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}},
            NO_THOUGHT,
        ),
    ],
)
def test_thinking_and_effort_are_variables_of_the_template(
    hermes: HttpServer, fields: dict[str, Any], shown: str
) -> None:
    assert prompt(hermes, *HI, **fields) == shown


def test_a_model_that_cannot_think_refuses_to_be_told_to(plain: HttpServer) -> None:
    assert "thinking.type" in error_of(send(plain, thinking={"type": "enabled"}))
    for kind in ("adaptive", "disabled"):
        assert send(plain, thinking={"type": kind}).status_code == 200


def test_an_output_format_is_a_grammar(hermes: HttpServer) -> None:
    format = {"type": "json_schema", "schema": {"type": "object"}}
    assert send(hermes, output_config={"format": format}).status_code == 200
    grammar = hermes.backend.grammars[-1]  # type: ignore[attr-defined]
    assert (grammar.kind, grammar.text) == ("json_schema", '{"type": "object"}')
    wrong = {"type": "json_schema", "schema": {"type": "nothing"}}
    told = error_of(send(hermes, output_config={"format": wrong}))
    assert "output_config.format.schema" in told


def test_an_edit_that_keeps_all_thoughts_is_no_edit(hermes: HttpServer) -> None:
    for keep in ("all", {"type": "all"}):
        edits = [{"type": "clear_thinking_20251015", "keep": keep}]
        assert prompt(hermes, *HI, context_management={"edits": edits}) == OPENS


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
    ({"messages": [turn("user", {"type": "image"})]}, "messages.0.content.0.type: .*'image'"),
    ({"messages": [turn("user", {"type": "document"})]}, "messages.0.content.0.*'document'"),
    ({"messages": [turn("user", {"type": "text"})]}, "messages.0.content.0.text is missing"),
    ({"messages": [turn("user", use())]}, "messages.0.content.0.type: .*'tool_use'"),
    ({"messages": [turn("user", {"type": "tool_result"})]}, "messages.0.content.0.tool_use_id"),
    (
        {"messages": [turn("user", result(content=[{"type": "image"}]))]},
        "messages.0.content.0.content.0.type: .*'image'",
    ),
    ({"messages": [turn("user", result(is_error=1))]}, "messages.0.content.0.is_error"),
    ({"messages": [turn("assistant", result())]}, "messages.0.content.0.type: .*'tool_result'"),
    (
        {"messages": [turn("assistant", {"type": "tool_use", "id": "a", "name": "f"})]},
        "messages.0.content.0.input is missing",
    ),
    (
        {"messages": [turn("assistant", {"type": "server_tool_use"})]},
        "messages.0.content.0.type: .*'server_tool_use'",
    ),
    ({"messages": [*HI, turn("assistant", "The", use())]}, "messages.1.content ends with a call"),
    ({"system": 5}, "system is 5"),
    ({"system": [{"type": "image"}]}, "system.0.type: .*'image'"),
    ({"temperature": 3}, "temperature is 3"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_k": -2}, "top_k is -2"),
    ({"stop_sequences": "x"}, "stop_sequences is"),
    ({"stop_sequences": [""]}, "stop_sequences must hold"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences has 17"),
    ({"stop_sequences": ["x" * 300]}, "stop_sequences: a stop string has 300"),
    ({"stream": "yes"}, "stream is"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.*web_search_2"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type .*bash_20250124"),
    ({"tools": [{"name": "add"}]}, "tools.0.input_schema is missing"),
    (tools(name="a b"), "tools.0.name is 'a b'"),
    (tools(defer_loading=True), "tools.0.defer_loading"),
    (tools(allowed_callers=["code_execution_20260120"]), "tools.0.allowed_callers"),
    ({"tools": [TOOL, TOOL]}, "tools.1.name: two tools"),
    ({"tools": [TOOL] * 129}, "tools holds 129"),
    ({"tool_choice": {"type": "any"}}, "tool_choice asks"),
    ({**tools(), "tool_choice": "any"}, "tool_choice is"),
    ({**tools(), "tool_choice": {"type": "some"}}, "tool_choice.type is"),
    ({**tools(), "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
    ({**tools(), "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name: .*'f'"),
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
        "output_config.format or a tool_choice",
    ),
    ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.e.*0"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs may not set messages"),
    ({"request_id": "a b"}, "request_id must be"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_a_wrong_field_is_named(hermes: HttpServer, fields: dict[str, Any], words: str) -> None:
    response = send(hermes, **fields)
    assert response.status_code == 400, response.text
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(error_of(response))


def test_tokens_are_counted_as_the_template_writes_the_prompt(hermes: HttpServer) -> None:
    body: dict[str, Any] = {"messages": [*HI, turn("assistant", use(a=1)), *HI], "system": "Be."}
    body |= {"tools": [TOOL], "thinking": {"type": "disabled"}}
    with anthropic.Anthropic(base_url=hermes.url, api_key="none", max_retries=0) as client:
        counted = client.messages.count_tokens(model="org/tiny", **body).input_tokens
        usage = client.messages.create(model="org/tiny", max_tokens=5, **body).usage
    assert counted == usage.input_tokens > 50
    fewer = hermes.http.post(COUNT, json={"messages": HI}).json()
    assert 0 < fewer["input_tokens"] < counted


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
@settings(max_examples=300, deadline=None)
def test_any_json_gets_a_2xx_or_a_4xx(
    hermes: HttpServer, path: str, body: dict[str, Any], blocks: list[Any], own: bool
) -> None:
    hermes.backend.text = "Hello"  # type: ignore[attr-defined]
    messages = [*HI, {"role": "assistant", "content": blocks}] if own else HI
    response = hermes.http.post(path, json={"messages": messages, "max_tokens": 9, **body})
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code == 400:
        error_of(response)
