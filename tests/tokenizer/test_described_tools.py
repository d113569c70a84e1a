"""Tools for templates that take none: in a system turn, and earlier calls and results as text."""

import json
from typing import Any

import pytest

from minisrv.errors import InvalidRequestError
from minisrv.tokenizer.chat_template import ChatTemplate

# As the template of SmolLM2 is built: a default system turn, and turns that hold only text.
CHATML = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}
{{ '<|im_start|>system\nDefault.<|im_end|>\n' }}{% endif %}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"""
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"properties": {"city": {"type": "string"}}}},
    },
    {"type": "function", "function": {"name": "caf\u00e9"}},
]
USER = {"role": "user", "content": "hi"}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


TURNS: list[dict[str, Any]] = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call("look", {"city": "\u00c5s"}), call("now", {})],
    },
    {"role": "tool", "content": "5", "tool_call_id": "c"},
    {"role": "tool", "content": "6", "tool_call_id": "c"},
    {"role": "assistant", "content": "Wait.", "tool_calls": [call("look", "{cut")]},
    {"role": "tool", "content": "7", "tool_call_id": "c"},
]


def render(
    messages: list[dict[str, Any]], tools: Any = None, source: str = CHATML, **options: Any
) -> str:
    template = ChatTemplate({"default": source}, {}, **{"describes_tools": True, **options})
    return template.render(messages, tools=tools)


def test_the_tools_are_in_the_first_system_turn() -> None:
    own = render([USER], TOOLS)
    assert own.count("<|im_start|>") == 2
    assert own.startswith("<|im_start|>system\n# Tools\n")
    assert '{"name": "look", "parameters": {"properties": {"city": {"type": "string"}}}}' in own
    assert '\n{"type": "function", "function": {"name": "caf\u00e9"}}\n</tools>' in own
    example = own.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0]
    assert json.loads(example).keys() == {"name", "arguments"}
    for role in ("system", "developer"):
        added = render([{"role": role, "content": "Be brief."}, USER], TOOLS)
        assert added == own.replace("# Tools", "Be brief.\n\n# Tools")


def test_earlier_calls_and_results_are_text() -> None:
    expected = (
        "<|im_start|>system\nDefault.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"city": "\u00c5s"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n5\n</tool_response>\n"
        "<tool_response>\n6\n</tool_response><|im_end|>\n"
        '<|im_start|>assistant\nWait.\n<tool_call>\n{"name": "look", "arguments": {cut}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n"
    )
    assert render(TURNS) == expected


def test_without_describing_such_a_template_fails_as_before() -> None:
    with pytest.raises(InvalidRequestError, match="template cannot render"):
        render(TURNS, TOOLS, describes_tools=False)
    assert "look" not in render([USER], TOOLS, describes_tools=False)


def test_a_template_that_takes_tools_or_writes_calls_does_so_itself() -> None:
    takes = "{% if tools %}T{% endif %}{{ messages | length }}"
    assert render(TURNS, TOOLS, takes) == "T6"
    writes = "{% for m in messages %}{{ m.role }}{{ m.tool_calls | length }} {% endfor %}"
    assert render(TURNS, TOOLS, writes) == "system0 user0 assistant2 tool0 tool0 assistant1 tool0 "


def test_a_template_of_a_request_is_asked_itself() -> None:
    template = ChatTemplate({"default": CHATML}, {}, describes_tools=True)
    assert template.render([USER], tools=TOOLS, chat_template="{{ tools | length }}") == "2"
    own = template.render([USER], tools=TOOLS, chat_template="{{ messages[0].role }}")
    assert own == "system"


@pytest.mark.parametrize(
    ("separator", "form"),
    [
        (
            "",
            '<｜tool▁call▁begin｜>function-name<｜tool▁sep｜>{"argument-name": ',
        ),
        (
            "```json",
            '<｜tool▁call▁begin｜>function<｜tool▁sep｜>function-name\n```json\n{"argument-',
        ),
    ],
)
def test_a_template_that_shows_a_form_of_calls_gets_a_description_of_it(
    separator: str, form: str
) -> None:
    source = (
        "{{ messages[0].content }}{{ messages[1].tool_calls }}<｜tool▁calls▁begin｜>" + separator
    )
    text = render([USER], TOOLS, source)
    assert form in text
    assert "<tool_call>" not in text
