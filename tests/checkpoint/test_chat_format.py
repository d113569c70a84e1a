"""What is found in chat templates: the ways to write calls and thoughts, and nothing else."""

import json
from dataclasses import asdict

import pytest

from minisrv.checkpoint.chat_format import ChatFormat, find_chat_format
from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.tools import read_tools

# The telling parts of the templates of these families.
QWEN = """{% if tools %}# Tools
within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>{% endif %}"""
QWEN_THINKING = (
    QWEN + "{{ message.content.split('</think>')[-1] }}{% if enable_thinking %}{% endif %}"
)
QWEN_CODER = "{% if tools %}<tool_call>\n<function=name>\n<parameter=x>\n{% endif %}"
GLM = "{% if tools %}<tool_call>{name}\n<arg_key>{key}</arg_key>{% endif %}"
DEEPSEEK = "{% for call in message.tool_calls %}<｜tool▁calls▁begin｜>{% endfor %}"
LLAMA = """{% if tools is not none %}Environment: ipython
{{ '{"name": "' + tool_call.name + '", "parameters": ' }}{% endif %}"""
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]{{ calls }}"
MAGISTRAL = MISTRAL + "[THINK]{{ thought }}[/THINK]"
R1 = "{{ content.split('</think>') }}<|Assistant|><think>\n"
GRANITE = "{% if thinking %}Think.{% endif %}"
THINK = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (QWEN, ChatFormat(takes_tools=True, tool_format="hermes")),
        (
            QWEN_THINKING,
            ChatFormat(
                takes_tools=True,
                tool_format="hermes",
                reasoning_markers=THINK,
                switches_reasoning=True,
            ),
        ),
        (QWEN_CODER, ChatFormat(takes_tools=True, tool_format="qwen3_coder")),
        (GLM, ChatFormat(takes_tools=True, tool_format="glm")),
        (DEEPSEEK, ChatFormat(tool_format="deepseek")),
        (LLAMA, ChatFormat(takes_tools=True, tool_format="llama")),
        (MISTRAL, ChatFormat(takes_tools=True, tool_format="mistral")),
        (
            MAGISTRAL,
            ChatFormat(
                takes_tools=True, tool_format="mistral", reasoning_markers=("[THINK]", "[/THINK]")
            ),
        ),
        (R1, ChatFormat(tool_format="hermes", reasoning_markers=THINK)),
        (GRANITE, ChatFormat(tool_format="hermes", switches_reasoning=True)),
        ("{{ messages[0].content }}", ChatFormat(tool_format="hermes")),
    ],
)
def test_a_family_is_known_by_its_template(template: str, found: ChatFormat) -> None:
    assert find_chat_format({"default": template}) == found
    assert ChatFormat.from_dict(json.loads(json.dumps(asdict(found)))) == found


def test_tools_are_described_only_to_a_template_that_takes_none_and_never_on_request() -> None:
    plain = {"default": "{{ messages[0].content }}"}
    assert find_chat_format(plain).needs_description
    assert not find_chat_format({"default": QWEN}).needs_description
    assert not find_chat_format({"default": QWEN_CODER}).needs_description
    assert not find_chat_format({}).needs_description
    assert find_chat_format(plain, describes_tools=False) == ChatFormat()


@pytest.mark.parametrize(
    ("template", "models"),
    [
        ("{{ tools }}<｜DSML｜function_calls>", "DeepSeek V3.2 and V4"),
        ("{{ tools }}<seed:tool_call><function=f><parameter=x>", "Seed-OSS"),
        ("{{ tools }}<tool_call><invoke name=f>", "MiniMax M3"),
        ("{{ tools }}<|python_tag|><function=f>", "Functionary"),
        ("{{ tools }}<tool>", None),
    ],
)
def test_a_form_that_is_not_read_is_known_by_name(template: str, models: str | None) -> None:
    found = find_chat_format({"default": template})
    assert found == ChatFormat(takes_tools=True, unread_form=models)
    with pytest.raises(InvalidRequestError) as caught:
        read_tools([{"function": {"name": "f"}}], "auto", True, found)
    assert caught.value.message.endswith(f"cannot read ({models})" if models else "cannot read")


def test_the_template_for_tools_is_asked_about_tools() -> None:
    both = {"default": "{{ messages }}", "tool_use": QWEN}
    assert find_chat_format(both).tool_format == "hermes"
    assert find_chat_format({}) == ChatFormat()
