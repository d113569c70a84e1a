"""What clients pass through to the template arrives as it came, numbers of any size included.

The oracle is the chat template in transformers, on values that Python's json has read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from minisrv.tokenizer.tool_arguments import read_arguments
from tests.support import own_tokenizers
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel

JSON = {"Content-Type": "application/json"}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
HI = '{"role":"user","content":"hi"}'
# As JSON.
VALUES = [
    "1000000000000000000000",
    "18446744073709551615",
    "-9223372036854775809",
    "9" * 4300,
    "-0",
    "-0.0",
    "1.0",
    "1E5",
    "1e22",
    "0.1",
    "5e-324",
    "1e-400",
    "123456789012345678.5",
    "1.7976931348623157e308",
    '"\\u00e9 \\ud83d\\ude00 \\u2028 / \\\\ \\" \\n <b>"',
    '[1,[2.50,{}],null,true,""]',
    '{"b":1,"a":{"":[]}}',
    "[" * 40 + "]" * 40,
]


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with serve(
        make_backend=functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    ) as running:
        yield running


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = own_tokenizers.save(tmp_path_factory.mktemp("model"), "byte_level_bpe")
    return AutoTokenizer.from_pretrained(path)


def prompt_of(server: HttpServer, path: str, body: str) -> str:
    """The prompt that a request is turned into."""
    response = server.http.post(path, content=body, headers=JSON)
    assert response.status_code == 200, response.text[:500]
    prompt: str = server.backend.prompts[-1]  # type: ignore[attr-defined]
    return prompt


def expected(theirs: Any, messages: list[Any], tools: Any = None, **variables: Any) -> str:
    text: str = theirs.apply_chat_template(
        messages,
        tools=tools,
        chat_template=TEMPLATES["hermes"],
        tokenize=False,
        add_generation_prompt=True,
        **variables,
    )
    return text


def chat_with(arguments: str) -> str:
    """A chat with an earlier call; `arguments` is the JSON of the value of that name."""
    call = f'{{"id":"c","type":"function","function":{{"name":"f","arguments":{arguments}}}}}'
    return (
        f'{{"messages":[{HI},{{"role":"assistant","content":null,"tool_calls":[{call}]}},'
        '{"role":"tool","tool_call_id":"c","content":"x"}]}'
    )


def expected_chat(theirs: Any, arguments: Any) -> str:
    function = {"name": "f", "arguments": arguments}
    return expected(
        theirs,
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": "x"},
        ],
    )


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
def test_the_arguments_of_an_earlier_call_pass_unchanged(
    server: HttpServer, theirs: Any, value: str
) -> None:
    text = f'{{"wei": {value}}}'
    prompt = expected_chat(theirs, json.loads(text))
    assert prompt_of(server, CHAT, chat_with(text)) == prompt
    assert prompt_of(server, CHAT, chat_with(json.dumps(text))) == prompt
    items = (
        f'[{HI},{{"type":"function_call","call_id":"c","name":"f","arguments":{json.dumps(text)}}},'
        '{"type":"function_call_output","call_id":"c","output":"x"}]'
    )
    assert prompt_of(server, RESPONSES, f'{{"input":{items}}}') == prompt
    block = f'{{"type":"tool_use","id":"c","name":"f","input":{text}}}'
    result = '{"type":"tool_result","tool_use_id":"c","content":"x"}'
    turns = (
        f'[{HI},{{"role":"assistant","content":[{block}]}},{{"role":"user","content":[{result}]}}]'
    )
    assert prompt_of(server, MESSAGES, f'{{"max_tokens":9,"messages":{turns}}}') == prompt


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
def test_the_schema_of_a_tool_passes_unchanged(server: HttpServer, theirs: Any, value: str) -> None:
    schema = f'{{"type":"object","properties":{{"n":{{"maximum":{value}}}}}}}'
    tool = {"type": "function", "function": {"name": "f", "parameters": json.loads(schema)}}
    prompt = expected(theirs, [json.loads(HI)], [tool])
    function = f'"name":"f","parameters":{schema}'
    chat = f'{{"messages":[{HI}],"tools":[{{"type":"function","function":{{{function}}}}}]}}'
    assert prompt_of(server, CHAT, chat) == prompt
    tools = f'[{{"name":"f","input_schema":{schema}}}]'
    body = f'{{"max_tokens":9,"messages":[{HI}],"tools":{tools}}}'
    assert prompt_of(server, MESSAGES, body) == prompt
    body = f'{{"input":[{HI}],"tools":[{{"type":"function",{function}}}]}}'
    assert prompt_of(server, RESPONSES, body) == prompt
    reply = server.http.post(RESPONSES, content=body, headers=JSON).json()
    assert repr(reply["tools"][0]["parameters"]) == repr(json.loads(schema))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
def test_other_user_data_is_accepted_with_any_numbers(
    server: HttpServer, theirs: Any, value: str
) -> None:
    message = HI.replace("}", f',"extra":{value}}}')
    variables = f'{{"reasoning_effort":{value}}}'
    body = f'{{"messages":[{message}],"metadata":{{"a":{value}}},"unknown":{value},'
    body += f'"chat_template_kwargs":{variables}}}'
    prompt = expected(theirs, [json.loads(message)], **json.loads(variables))
    assert prompt_of(server, CHAT, body) == prompt


# Text that no strict JSON parser reads: what Python reads of it, or None where it stays text.
WRITTEN_BY_A_MODEL: list[tuple[str, str | None]] = [
    ('{"a": 1e400}', '{"a": Infinity}'),
    ('{"a": NaN}', '{"a": NaN}'),
    ('{"a": 1, "a": 2}', '{"a": 2}'),
    ("", "{}"),
    (" \n", "{}"),
    ('{"a": 1', None),
    ("[1]", None),
    ("5", None),
    ('{"a": ' + "9" * 4301 + "}", None),
    ('{"a": "\\ud800"}', None),
    ('{"a": ' + "[" * 100_000 + "}", None),
]


@pytest.mark.parametrize(("text", "read"), WRITTEN_BY_A_MODEL, ids=lambda text: str(text)[:20])
def test_arguments_that_a_model_wrote_need_not_be_strict(
    server: HttpServer, theirs: Any, text: str, read: str | None
) -> None:
    """The text of arguments is read as Python reads it; text that is not an object stays text."""
    arguments = text if read is None else json.loads(read)
    assert prompt_of(server, CHAT, chat_with(json.dumps(text))) == expected_chat(theirs, arguments)


@given(st.text(max_size=20) | st.dictionaries(st.text(max_size=3), st.text() | st.floats()))
def test_arguments_are_an_object_or_stay_as_they_are(value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    read = read_arguments(text)
    assert isinstance(read, dict) or read == text
    json.dumps(read, ensure_ascii=False).encode(errors="strict" if read is not text else "replace")


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9" * 400 + ".0"])
def test_a_number_that_no_double_holds_is_refused_in_a_body(
    server: HttpServer, number: str
) -> None:
    response = server.http.post(CHAT, content=chat_with(f'{{"a":[0,{number}]}}'), headers=JSON)
    assert response.status_code == 400
    path = "messages.1.tool_calls.0.function.arguments.a.1"
    assert response.json()["error"]["param"] == path


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), JSON_VALUES, max_size=3))
def test_any_arguments_pass_unchanged(
    server: HttpServer, theirs: Any, arguments: dict[str, Any]
) -> None:
    text = json.dumps(arguments, ensure_ascii=True)
    if "\\ud" in text:
        json.dumps(arguments, ensure_ascii=False).encode()
    prompt = expected_chat(theirs, arguments)
    assert prompt_of(server, CHAT, chat_with(text)) == prompt
    assert prompt_of(server, CHAT, chat_with(json.dumps(text))) == prompt
