"""Tool calls and thoughts over HTTP, as the `openai` package reads them."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel

CHAT = "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tell it.",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
        },
    }
    for name in ("get_time", "add")
]
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'
WRITTEN = {
    "hermes": f"Yes.\n{CALL}\n{CALL}",
    "llama": '<|python_tag|>{"name": "get_time", "parameters": {"zone": "UTC"}}; '
    '{"name": "get_time", "parameters": {"zone": "UTC"}}',
    "mistral": "Yes." + '[TOOL_CALLS]get_time[ARGS]{"zone": "UTC"}' * 2,
    "qwen3_coder": "Yes."
    + "\n<tool_call>\n<function=get_time>\n<parameter=zone>\nUTC\n</parameter>\n</function>\n"
    "</tool_call>" * 2,
    "glm": "Yes."
    + "\n<tool_call>get_time\n<arg_key>zone</arg_key>\n<arg_value>UTC</arg_value>\n</tool_call>"
    * 2,
    "deepseek": "Yes.<｜tool▁calls▁begin｜>"
    + '<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{"zone": "UTC"}<｜tool▁call▁end｜>' * 2
    + "<｜tool▁calls▁end｜>",
}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, HttpServer]]:
    made = {}
    contexts = []
    for name, template in TEMPLATES.items():
        context = serve(make_backend=functools.partial(PlayedModel, template=template))
        contexts.append(context)
        made[name] = context.__enter__()
    yield made
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture
def hermes(servers: dict[str, HttpServer]) -> HttpServer:
    return servers["hermes"]


def whole(server: HttpServer, text: str, **body: Any) -> ChatCompletion:
    server.backend.text = text  # type: ignore[attr-defined]
    response = server.http.post(CHAT, json={"messages": HI, **body})
    assert response.status_code == 200, response.text
    return ChatCompletion.model_validate_json(response.content, strict=True)


def chunks(server: HttpServer, text: str, **body: Any) -> list[ChatCompletionChunk]:
    server.backend.text = text  # type: ignore[attr-defined]
    response = server.http.post(CHAT, json={"messages": HI, "stream": True, **body})
    assert response.status_code == 200, response.text
    *events, last, rest = response.content.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [
        ChatCompletionChunk.model_validate(json.loads(event.removeprefix("data: ")), strict=True)
        for event in events
    ]


def joined(stream: list[ChatCompletionChunk]) -> tuple[str, str, list[Any], str | None]:
    """ReasoningText, content, calls (id, type, name, arguments) and finish reason of a stream."""
    thought, content, calls = "", "", list[list[Any]]()
    assert stream[0].choices[0].delta.role == "assistant"
    for chunk in stream[1:-1]:
        delta = chunk.choices[0].delta
        assert chunk.choices[0].finish_reason is None
        thought += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        for call in delta.tool_calls or []:
            assert call.function is not None
            if call.id is not None:
                assert call.index == len(calls)
                assert call.function.arguments == ""
                calls.append([call.id, call.type, call.function.name, ""])
            else:
                assert (call.index, call.function.name) == (len(calls) - 1, None)
                calls[-1][3] += call.function.arguments or ""
    assert stream[-1].choices[0].delta.model_dump(exclude_unset=True) == {}
    return thought, content, calls, stream[-1].choices[0].finish_reason


def parts(completion: ChatCompletion) -> tuple[str, str, list[Any], str | None]:
    choice = completion.choices[0]
    calls = [
        [call.id, call.type, call.function.name, call.function.arguments]
        for call in choice.message.tool_calls or []
        if call.type == "function"
    ]
    thought = getattr(choice.message, "reasoning_content", None) or ""
    return thought, choice.message.content or "", calls, choice.finish_reason


@pytest.mark.parametrize("tool_format", WRITTEN)
def test_calls_come_whole_and_in_pieces(servers: dict[str, HttpServer], tool_format: str) -> None:
    server = servers[tool_format]
    _, content, calls, finish = parts(whole(server, WRITTEN[tool_format], tools=TOOLS))
    assert content == ("" if tool_format == "llama" else "Yes.")
    assert [call[1:] for call in calls] == [["function", "get_time", '{"zone": "UTC"}']] * 2
    assert finish == "tool_calls"
    assert calls[0][0] != calls[1][0]
    assert len(calls[0][0]) == (9 if tool_format == "mistral" else 29)
    _, streamed, streamed_calls, finish = joined(chunks(server, WRITTEN[tool_format], tools=TOOLS))
    assert (streamed, finish) == (content, "tool_calls")
    assert [call[1:] for call in streamed_calls] == [call[1:] for call in calls]


def test_the_arguments_come_in_more_than_one_piece(hermes: HttpServer) -> None:
    stream = chunks(hermes, CALL, tools=TOOLS)
    pieces = [chunk for chunk in stream if chunk.choices[0].delta.tool_calls]
    assert len(pieces) > 3


def test_a_message_of_only_calls_has_no_content(hermes: HttpServer) -> None:
    message = whole(hermes, CALL, tools=TOOLS).choices[0].message
    assert message.content is None
    assert whole(hermes, "", tools=TOOLS).choices[0].message.content == ""


@pytest.mark.parametrize("text", [CALL, "Noon.", f"Yes.\n{CALL}", "", "<think>Hm.</think>"])
def test_the_stream_helper_adds_up_the_content_of_the_whole_message(
    hermes: HttpServer, text: str
) -> None:
    content = whole(hermes, text, tools=TOOLS).choices[0].message.content
    with hermes.openai.chat.completions.stream(model="", messages=HI, tools=TOOLS) as stream:
        assert stream.get_final_completion().choices[0].message.content == content


@pytest.mark.parametrize(
    ("text", "thought", "content"),
    [
        ("<think>so </thi", "so </thi", ""),
        ("<think>so</think>Yes. <tool_ca", "so", "Yes. <tool_ca"),
        ("<thin", "", "<thin"),
    ],
)
def test_what_was_held_back_as_the_begin_of_a_mark_is_returned_at_the_end(
    hermes: HttpServer, text: str, thought: str, content: str
) -> None:
    assert parts(whole(hermes, text, tools=TOOLS))[:2] == (thought, content)
    assert joined(chunks(hermes, text, tools=TOOLS))[:2] == (thought, content)


def test_each_choice_has_calls_of_its_own(hermes: HttpServer) -> None:
    choices = whole(hermes, f"A{CALL}", tools=TOOLS, n=3).choices
    ids = {call.id for choice in choices for call in choice.message.tool_calls or []}
    assert len(ids) == 3
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks(hermes, f"A{CALL}", tools=TOOLS, n=3):
        (choice,) = chunk.choices
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            texts[choice.index] += call.function.arguments or ""
    assert set(texts.values()) == {'{"zone": "UTC"}'}


def test_the_stream_helper_of_the_client_assembles_the_calls(hermes: HttpServer) -> None:
    hermes.backend.text = "Hm.\n" + CALL  # type: ignore[attr-defined]
    with hermes.openai.chat.completions.stream(
        model="org/tiny", messages=HI, tools=TOOLS
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("get_time", '{"zone": "UTC"}')
    ]
    assert final.choices[0].message.content == "Hm."
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_call_that_is_cut_off_says_length(hermes: HttpServer) -> None:
    full = len(hermes.backend.tokenizer.encode(CALL))  # type: ignore[attr-defined]
    for max_tokens in range(1, full):
        limits = {"tools": TOOLS, "max_tokens": max_tokens}
        _, content, calls, finish = parts(whole(hermes, CALL, **limits))
        _, streamed, streamed_calls, ends = joined(chunks(hermes, CALL, **limits))
        assert (content, finish) == (streamed, ends)
        assert [call[1:] for call in streamed_calls] == [call[1:] for call in calls]
        assert (content, finish) == ("", "length")
        if calls:
            assert '{"zone": "UTC"}'.startswith(calls[0][3])


def test_a_reply_that_stops_inside_a_call_says_stop(hermes: HttpServer) -> None:
    for text, stop in ((f"{CALL}\n{CALL[:60]}", []), (f"{CALL}\n{CALL}", ["zone"])):
        _, content, calls, finish = parts(whole(hermes, text, tools=TOOLS, stop=stop))
        assert (content, finish) == ("", "stop")
        assert len(calls) == 1 + (not stop)


def test_without_parallel_calls_the_first_ends_the_reply(hermes: HttpServer) -> None:
    body = {"tools": TOOLS, "parallel_tool_calls": False}
    _, content, calls, finish = parts(whole(hermes, f"A{CALL}{CALL} more", **body))
    assert (content, len(calls), finish) == ("A", 1, "tool_calls")


@pytest.mark.parametrize("body", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_nothing_is_a_call(hermes: HttpServer, body: dict[str, Any]) -> None:
    _, content, calls, finish = parts(whole(hermes, CALL, **body))
    assert (content, calls, finish) == (CALL, [], "stop")
    assert "get_time" not in hermes.backend.prompts[-1]  # type: ignore[attr-defined]


def test_special_tokens_are_shown_only_to_the_parser(servers: dict[str, HttpServer]) -> None:
    server = servers["mistral"]
    text = 'A[TOOL_CALLS]get_time[ARGS]{"zone": "UTC"}'
    assert parts(whole(server, text))[1] == 'Aget_time{"zone": "UTC"}'
    assert parts(whole(server, text, skip_special_tokens=False))[1] == text


def test_calls_and_results_go_back_through_the_template(hermes: HttpServer) -> None:
    completion = whole(hermes, "<think>\nhm\n</think>\n\n" + CALL, tools=TOOLS)
    message = completion.choices[0].message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "12:00"}
    whole(hermes, "Noon.", tools=TOOLS, messages=[*HI, message, result])
    assert hermes.backend.prompts[-1].endswith(  # type: ignore[attr-defined]
        '<|user|>hi<|assistant|><think>hm</think> CALL get_time {"zone": "UTC"}<|tool|>12:00'
        "<|assistant|>"
    )


def test_the_template_shows_the_tools_as_they_were_sent(hermes: HttpServer) -> None:
    whole(hermes, "a", tools=TOOLS)
    prompt = hermes.backend.prompts[-1]  # type: ignore[attr-defined]
    assert prompt.startswith("<|sys|>\n" + "\n".join(map(json.dumps, TOOLS)))


NAMED = {"type": "function", "function": {"name": "add"}}
BAD = {"type": "object", "properties": {"a": {"type": "number", "pattern": "(", "format": "x"}}}
BAD["properties"]["b"] = {"type": "string", "pattern": "("}  # type: ignore[index]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "required"}, ["get_time", "add"]),
        ({"tool_choice": NAMED}, ["add"]),
        ({"tool_choice": NAMED, "parallel_tool_calls": True}, ["add"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["get_time", "add"]),
        ({"tool_choice": "auto"}, []),
    ],
)
def test_a_call_that_must_be_made_is_held_to_by_a_grammar(
    hermes: HttpServer, fields: dict[str, Any], names: list[str]
) -> None:
    _, content, calls, finish = parts(whole(hermes, CALL, tools=TOOLS, **fields))
    assert (content, len(calls), finish) == ("", 1, "tool_calls")
    grammar = hermes.backend.grammars[-1]  # type: ignore[attr-defined]
    if not names:
        assert grammar is None
        return
    assert [name for name in ("get_time", "add") if name in grammar.text] == names
    assert grammar.before
    assert ("*" in grammar.text.splitlines()[0]) == (fields == {"tool_choice": "required"})


@pytest.mark.parametrize("tool_format", WRITTEN)
def test_a_named_tool_is_called_exactly_once(
    servers: dict[str, HttpServer], tool_format: str
) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": NAMED}
    written = WRITTEN[tool_format].removeprefix("Yes.").replace("get_time", "add")
    _, content, calls, finish = parts(whole(servers[tool_format], written, **fields))
    assert (content, len(calls), finish) == ("", 1, "tool_calls")
    _, content, calls, finish = joined(chunks(servers[tool_format], written, **fields))
    assert (content, len(calls), finish) == ("", 1, "tool_calls")


@pytest.mark.parametrize(
    ("path", "fields", "limit", "end"),
    [
        (CHAT, {"messages": HI, "tools": TOOLS}, "max_tokens", '"finish_reason":"length"'),
        (
            "/v1/responses",
            {"input": "hi", "tools": [{"type": "function", **tool["function"]} for tool in TOOLS]},
            "max_output_tokens",
            '"status":"incomplete"',
        ),
        (
            "/v1/messages",
            {"messages": HI, "tools": [{"name": "get_time", "input_schema": {"type": "object"}}]},
            "max_tokens",
            '"stop_reason":"max_tokens"',
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_second_call_that_is_cut_off_is_in_no_content(
    hermes: HttpServer, path: str, fields: dict[str, Any], limit: str, end: str, stream: bool
) -> None:
    hermes.backend.text = f"{CALL}\n{CALL}"  # type: ignore[attr-defined]
    count = hermes.backend.tokenizer.encode  # type: ignore[attr-defined]
    full = len(count(f"{CALL}\n<tool_call>\n{{"))
    for max_tokens in (len(count(f"{CALL}\n<tool_call>")), full, full + 3):
        body = {**fields, limit: max_tokens, "stream": stream}
        response = hermes.http.post(path, json=body)
        assert response.status_code == 200, response.text
        assert end in response.text
        assert "tool_call>" not in response.text
        assert "get_time" in response.text


@pytest.mark.parametrize("tool_choice", ["auto", "none"])
def test_a_reply_in_json_may_call_a_tool_instead_where_the_choice_is_free(
    hermes: HttpServer, tool_choice: str
) -> None:
    schema = {"type": "object", "required": ["zone"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    fields = {"tools": TOOLS, "tool_choice": tool_choice, "response_format": response_format}
    whole(hermes, CALL, **fields)
    grammar = hermes.backend.grammars[-1]  # type: ignore[attr-defined]
    assert json.loads(grammar.text) == schema
    assert ("get_time" in grammar.before) == (tool_choice == "auto")
    schema["required"] = "zone"  # type: ignore[assignment]
    refused = hermes.http.post(CHAT, json={"messages": HI, **fields})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{}]}, "tools.0.type", None),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", None),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", None),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name",
            None,
        ),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools.1.function.name", None),
        ({"tools": TOOLS * 65}, "tools", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", None),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", None),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
            "tool_choice.type",
            "unsupported_parameter",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "tool_choice.function.name",
            None,
        ),
        ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "tool_choice", None),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": BAD}}],
                "tool_choice": "required",
            },
            "tools.0.function.parameters",
            None,
        ),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls", None),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", None),
        ({"reasoning_effort": "none", "enable_thinking": True}, "reasoning_effort", None),
    ],
)
def test_a_wrong_field_is_named(
    hermes: HttpServer, fields: dict[str, Any], param: str, code: str | None
) -> None:
    response = hermes.http.post(CHAT, json={"messages": HI, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


def test_tools_that_the_template_does_not_take_are_described(
    servers: dict[str, HttpServer],
) -> None:
    server = servers["plain"]
    _, content, calls, finish = parts(whole(server, f"Yes.\n{CALL}", tools=TOOLS))
    assert (content, len(calls), finish) == ("Yes.", 1, "tool_calls")
    prompt = server.backend.prompts[-1]  # type: ignore[attr-defined]
    assert prompt.startswith("# Tools")
    assert prompt.endswith("hi")
    assert all(json.dumps(tool) in prompt for tool in TOOLS)
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        *HI,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "12:00"},
    ]
    whole(server, "Noon.", tools=TOOLS, messages=messages)
    prompt = server.backend.prompts[-1]  # type: ignore[attr-defined]
    assert prompt.startswith("Be brief.\n\n# Tools")
    assert prompt.endswith(f"hi{CALL}<tool_response>\n12:00\n</tool_response>")
    whole(server, CALL, tools=TOOLS, tool_choice=NAMED)
    assert '"add\\"' in server.backend.grammars[-1].text  # type: ignore[attr-defined]


def test_what_the_template_cannot_do_is_refused(servers: dict[str, HttpServer]) -> None:
    response = servers["plain"].chat(enable_thinking=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "enable_thinking"
    refusing = functools.partial(PlayedModel, template=TEMPLATES["plain"], describes_tools=False)
    with serve(make_backend=refusing) as server:
        response = server.chat(tools=TOOLS)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
        assert "does not accept tools" in error["message"]
    response = servers["plain"].chat(reasoning_effort="none")
    assert response.status_code == 200
    assert "x-minisrv-warnings" not in response.headers


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        (CHAT, {"messages": HI, "reasoning_effort": "low"}, "reasoning_effort"),
        ("/v1/responses", {"input": "hi", "reasoning": {"effort": "low"}}, "reasoning.effort"),
    ],
)
def test_an_effort_that_the_template_does_not_read_passes_with_a_warning(
    servers: dict[str, HttpServer], path: str, body: dict[str, Any], name: str
) -> None:
    response = servers["plain"].http.post(path, json=body)
    assert response.status_code == 200
    warning = response.headers["x-minisrv-warnings"]
    assert warning.startswith(f"{name} has no effect")
    assert "x-minisrv-warnings" not in servers["hermes"].http.post(path, json=body).headers


def test_a_thought_stands_apart_and_is_counted(hermes: HttpServer) -> None:
    text = "<think>\nLet me see \U0001f914\n</think>\n\nHello"
    completion = whole(hermes, text)
    assert parts(completion) == ("Let me see \U0001f914", "Hello", [], "stop")
    tokens = hermes.backend.tokenizer.encode(text.removesuffix("\n\nHello"))  # type: ignore[attr-defined]
    assert completion.usage is not None
    assert completion.usage.completion_tokens_details is not None
    assert completion.usage.completion_tokens_details.reasoning_tokens == len(tokens)
    options = {"stream_options": {"include_usage": True}}
    *stream, last = chunks(hermes, text, **options)
    assert joined(stream) == parts(completion)
    assert last.usage == completion.usage


def test_a_thought_that_is_cut_off_has_no_content(hermes: HttpServer) -> None:
    completion = whole(hermes, "<think>\nLet me see", max_tokens=4)
    assert completion.choices[0].message.content is None
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens_details is not None
    assert completion.usage.completion_tokens_details.reasoning_tokens == 4


def test_a_thought_that_the_prompt_opens_needs_no_tag(hermes: HttpServer) -> None:
    text = "so\n</think>\n\nHello"
    assert parts(whole(hermes, text, reasoning_effort="high"))[:2] == ("so", "Hello")
    assert hermes.backend.prompts[-1].endswith("<think>\n")  # type: ignore[attr-defined]
    assert parts(whole(hermes, text))[:2] == ("", text)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_thinking_is_turned_off(hermes: HttpServer, fields: dict[str, Any]) -> None:
    whole(hermes, "a", **fields)
    assert hermes.backend.prompts[-1].endswith("</think>\n\n")  # type: ignore[attr-defined]


def test_stop_strings_begin_behind_the_thought(hermes: HttpServer) -> None:
    text = "<think>one STOP two</think>three STOP four"
    choice = whole(hermes, text, stop=["STOP"]).choices[0]
    assert choice.message.content == "three "
    assert choice.message.reasoning_content == "one STOP two"  # type: ignore[attr-defined]
    assert choice.stop_reason == "STOP"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("option", "names"),
    [("reasoning", {"reasoning"}), ("both", {"reasoning", "reasoning_content"})],
)
def test_the_field_of_the_thought_is_an_option(option: str, names: set[str]) -> None:
    backend = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    with serve(make_backend=backend, reasoning_field=option) as server:
        completion = whole(server, "<think>h</think>Hello")
        extra = completion.choices[0].message.model_extra
        assert extra == dict.fromkeys(names, "h")
        deltas = [
            chunk.choices[0].delta.model_extra for chunk in chunks(server, "<think>h</think>")
        ]
        assert dict.fromkeys(names, "h") in deltas


MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "\n", "[ARGS]", "[TOOL_CALLS]", "; "]
CALLS = [CALL, CALL[:40], '[TOOL_CALLS]add[ARGS]{"a": 1}', "<|python_tag|>"]
CALLS.append('{"name": "add", "parameters": {"a": "\u4f60\U0001f600"}}')
CHARS = st.sampled_from('ab \n\u4f60\u0301\U0001f600\u200d<>{}[]"')
SEGMENT = st.text(CHARS, max_size=8) | st.text(max_size=4) | st.sampled_from(MARKS + CALLS)
TEXT = st.lists(SEGMENT, max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)), TEXT, st.booleans(), st.integers(1, 9), st.integers(1, 60)
)
def test_a_stream_joins_to_the_whole_answer(
    servers: dict[str, HttpServer],
    template: str,
    text: str,
    thinking: bool,
    batch: int,
    max_tokens: int,
) -> None:
    server = servers[template]
    body: dict[str, Any] = {"max_tokens": max_tokens}
    if template != "plain":
        body["tools"] = TOOLS
    text = f"<think>{text}</think>{text}" if thinking else text
    server.backend.batch = batch  # type: ignore[attr-defined]
    thought, content, calls, finish = parts(whole(server, text, **body))
    *streamed, streamed_calls, ends = joined(chunks(server, text, **body))
    assert streamed == [thought, content]
    assert [call[1:] for call in streamed_calls] == [call[1:] for call in calls]
    assert ends == finish
