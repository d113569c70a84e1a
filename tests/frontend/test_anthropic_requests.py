"""What is done with each field of /v1/messages: its effect on prompt, sampler and reply."""

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

from minisrv.frontend.apis.anthropic.fields import COUNT_FIELDS, MESSAGES_FIELDS
from minisrv.frontend.fields.table import Treatment
from tests.support.anthropic_bodies import (
    COUNT,
    HI,
    TIME,
    TOOL,
    error_of,
    result,
    send,
    text,
    turn,
    use,
)
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel

IGNORED = [n for n, f in MESSAGES_FIELDS.items() if f.treatment is Treatment.IGNORED]


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


def prompt(server: HttpServer, *messages: Any, **body: Any) -> str:
    """What the model is shown for these messages."""
    response = send(server, messages=list(messages), **body)
    assert response.status_code == 200, response.text
    text: str = server.backend.prompts[-1]  # type: ignore[attr-defined]
    return text


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


def test_harmless_fields_change_nothing(hermes: HttpServer) -> None:
    bare = prompt(hermes, *HI)
    body = {name: {"any": [1]} for name in IGNORED}
    assert prompt(hermes, *HI, **body) == bare
    assert "x-minisrv-warnings" not in send(hermes, **body).headers


def test_a_null_and_a_neutral_value_never_fail(hermes: HttpServer) -> None:
    nulls = dict.fromkeys(MESSAGES_FIELDS) | {"messages": HI, "max_tokens": 9}
    assert send(hermes, **nulls).status_code == 200
    for name, field in MESSAGES_FIELDS.items():
        for neutral in field.neutral:
            assert send(hermes, **{name: neutral}).status_code == 200


def test_an_unknown_field_is_reported_or_refused() -> None:
    with serve() as server:
        assert "made_up" in send(server, made_up=1).headers["x-minisrv-warnings"]
    with serve(strict_params=True) as server:
        assert "made_up" in error_of(send(server, made_up=1))


def test_a_thinking_budget_is_reported_as_not_enforced(hermes: HttpServer) -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}
    response = send(hermes, thinking=thinking, made_up=1)
    told = response.headers["x-minisrv-warnings"]
    assert "made_up; thinking.budget_tokens is not enforced" in told


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
        ({"type": "tool", "name": "add"}, ["add"], False),
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


def test_an_edit_that_keeps_all_thoughts_changes_nothing(hermes: HttpServer) -> None:
    for keep in ("all", {"type": "all"}):
        edits = [{"type": "clear_thinking_20251015", "keep": keep}]
        assert prompt(hermes, *HI, context_management={"edits": edits}) == OPENS


def test_tokens_are_counted_as_the_template_writes_the_prompt(hermes: HttpServer) -> None:
    body: dict[str, Any] = {"messages": [*HI, turn("assistant", use(a=1)), *HI], "system": "Be."}
    body |= {"tools": [TOOL], "thinking": {"type": "disabled"}}
    with anthropic.Anthropic(base_url=hermes.url, api_key="none", max_retries=0) as client:
        counted = client.messages.count_tokens(model="org/tiny", **body).input_tokens
        usage = client.messages.create(model="org/tiny", max_tokens=5, **body).usage
    assert counted == usage.input_tokens > 50
    fewer = hermes.http.post(COUNT, json={"messages": HI}).json()
    assert 0 < fewer["input_tokens"] < counted
