import functools
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from minisrv.errors import ConfigError, InvalidRequestError
from minisrv.tokenizer import chat_template
from minisrv.tokenizer.chat_template import ChatTemplate
from tests.support import own_tokenizers

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "bos": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
    "{% endfor %}",
    "lstrip and trim": """
    {% for m in messages %}
        {% if m.role == 'user' %}
  U: {{ m.content }}
        {% else %}
  O: {{ m.content }}
        {% endif %}
    {% endfor %}
tail
""",
    "tools": """{% if tools %}TOOLS
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% else %}none{% endif %}{{ messages[0].content }}""",
    "tojson options": "{{ messages | tojson(indent=2, sort_keys=true) }}"
    "{{ messages[0] | tojson(separators=(',', ':'), ensure_ascii=true) }}",
    "tool calls": """{% for m in messages %}{% for call in m.tool_calls or [] %}
<call>{"name": "{{ call.function.name }}", "args": {{ call.function.arguments | tojson }}}</call>
{% endfor %}{{ m.content or '(no content)' }}{% endfor %}""",
    "break and continue": """{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}
{{ m.content }}{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}""",
    "strftime_now": "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[0].content }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}",
    "generation scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}"
    "{{ x }}",
    "namespace": "{% set ns = namespace(system='', n=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.system }}/{{ ns.n }}",
    "macro": "{% macro turn(role, text, end='<end>') %}<{{ role }}>{{ text | trim }}{{ end }}"
    "{% endmacro %}{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}"
    "{{ turn('assistant', '', end='') }}",
    "macro with caller": "{% macro wrap(tag) %}<{{ tag }}>{{ caller() }}</{{ tag }}>{% endmacro %}"
    "{% for m in messages %}{% call wrap(m.role) %}{{ m.content }}{% endcall %}{% endfor %}",
    "template kwargs": "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}{{ messages[-1].content }}{{ level | default('low') }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|"
    "{{ m.content }};"
    "{% endfor %}",
    "slices": "{% for m in messages[1:] %}{{ loop.index }}{{ m.content }}{{ loop.last }}"
    "{% endfor %}"
    "{{ messages[::-1][0].role }}",
    "tests": "{% for m in messages %}{% if m.content is string and m.content is not mapping %}s"
    "{% elif m.content is iterable %}i{% endif %}{{ m.name is defined }}{{ m.name is none }}"
    "{% endfor %}",
    "string methods": "{% for m in messages %}{{ (m.content or '').strip().split('a')[0]"
    ".rstrip('\\n').replace('e', 'E') | upper }}{{ 'x'.startswith('x') }}{% endfor %}",
    "content parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
    "dict iteration": "{% for m in messages %}{% for key, value in m.items() | sort %}{{ key }}="
    "{{ value }};{% endfor %}{% endfor %}{{ dict(a=1, b=2) | tojson }}",
    "selectattr and join": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute="
    "'content') | join(' + ') }}{{ messages | map(attribute='role') | unique | list | length }}",
    "undefined prints nothing": "{{ nothing }}{{ messages[0].missing }}{{ documents }}{{ tools }}.",
    "comments and set block": "{# a note #}{% set head %}H{{ messages | length }}{% endset %}"
    "{{ head }}{{- '  x  ' -}}  {{ '\\n' }}",
    "filters": "{{ messages[0].content | length }}{{ [3, 1, 2] | sort | join(',') }}"
    "{{ '%s-%d' | format('a', 3) }}{{ messages[0].content | replace('a', 'b') | indent(2) }}",
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "look", "arguments": {"city": "Zürich", "n": [1, None, 2.5]}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "  hi <b>&amp; 'there'\n"}],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a café?"},
        {"role": "assistant", "content": "A place.", "reasoning": "easy"},
        {"role": "user", "content": "Thanks 👍"},
    ],
    "tool call": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 3}', "tool_call_id": "c1", "name": "look"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"properties": {"city": {"type": "string"}}}},
    }
]
SPECIAL = own_tokenizers.NAMED


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = own_tokenizers.save(tmp_path_factory.mktemp("model"), "byte_level_bpe")
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("kwargs", "tools", "prompting"),
    [({}, None, True), ({"enable_thinking": False, "level": 3}, TOOLS, False)],
)
def test_the_prompt_equals_that_of_transformers(
    theirs: Any, name: str, chat: str, kwargs: dict[str, Any], tools: Any, prompting: bool
) -> None:
    def expected() -> str:
        return theirs.apply_chat_template(  # type: ignore[no-any-return]
            CHATS[chat],
            chat_template=TEMPLATES[name],
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompting,
            **kwargs,
        )

    template = ChatTemplate({"default": TEMPLATES[name]}, SPECIAL)
    try:
        text = expected()
    except Exception:
        with pytest.raises(InvalidRequestError):
            template.render(CHATS[chat], kwargs, tools, prompting)
        return
    rendered = template.render(CHATS[chat], kwargs, tools, prompting)
    assert rendered in (text, expected())  # the date may turn between the two


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_continued_message_ends_the_prompt_as_in_transformers(
    theirs: Any, name: str, chat: str
) -> None:
    """Transformers also refuses a message that the template changes, such as to JSON."""

    def expected() -> str:
        return theirs.apply_chat_template(  # type: ignore[no-any-return]
            CHATS[chat],
            chat_template=TEMPLATES[name],
            tokenize=False,
            continue_final_message=True,
        )

    template = ChatTemplate({"default": TEMPLATES[name]}, SPECIAL)
    ours = functools.partial(
        template.render, CHATS[chat], add_generation_prompt=False, continue_final_message=True
    )
    try:
        text = expected()
    except Exception:
        return
    assert ours() in (text, expected())


def test_most_templates_render_most_chats(theirs: Any) -> None:
    """So that the test above compares texts and not failures."""
    rendered = 0
    for source in TEMPLATES.values():
        for chat in CHATS.values():
            try:
                rendered += bool(ChatTemplate({"default": source}, SPECIAL).render(chat))
            except InvalidRequestError:
                continue
    assert len(TEMPLATES) >= 20
    assert rendered >= 0.9 * len(TEMPLATES) * len(CHATS)


def render(source: str, *messages: dict[str, Any], **kwargs: Any) -> str:
    return ChatTemplate({"default": source}, SPECIAL).render(messages, kwargs)


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].a.b }}", "has no attribute 'a'"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[0].content.nothing() }}", "nothing"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ nothing | tojson }}", "JSON"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'other' %}", "loader"),
    ],
)
def test_a_failing_template_is_an_invalid_request_in_its_words(source: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        render(source, USER)
    assert caught.value.param == "messages"
    assert len(caught.value.message) < 1000


def test_a_template_cannot_write_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 10_000)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}abc{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="more than 10000 characters"):
        render(endless, USER)


def test_a_template_cannot_change_the_messages() -> None:
    messages = [{"role": "user", "content": "hi"}]
    template = ChatTemplate({"default": "{{ messages.pop() }}"}, SPECIAL)
    with pytest.raises(InvalidRequestError):
        template.render(messages)
    assert messages == [USER]


def test_a_developer_is_a_system_to_a_template_that_does_not_know_it() -> None:
    developer = {"role": "developer", "content": "x"}
    assert render("{{ messages[0].role }}", developer) == "system"
    knowing = "{% if messages[0].role == 'developer' %}D{% endif %}"
    assert render(knowing, developer) == "D"


def test_the_variables_of_the_server_cannot_be_replaced() -> None:
    source = "{{ messages | length }}{{ bos_token }}"
    assert render(source, USER, messages=[], bos_token="B") == "1B"


def test_without_a_template_the_way_out_is_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"--chat-template") as caught:
        ChatTemplate({}, {}).render([USER])
    assert "/v1/completions" in caught.value.message


def test_named_templates_are_chosen_as_by_transformers() -> None:
    both = ChatTemplate({"default": "D", "tool_use": "T"}, {})
    assert (both.render([USER]), both.render([USER], tools=TOOLS)) == ("D", "T")
    with pytest.raises(InvalidRequestError, match="no default"):
        ChatTemplate({"rag": "R"}, {}).render([USER])


def test_a_template_that_does_not_compile_is_a_config_error_with_its_line() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate({"default": "ok\n{% if %}"}, {})


def test_a_template_file_is_used_as_written(tmp_path: Path) -> None:
    path = own_tokenizers.save(tmp_path, "byte_level_bpe", chat_template=CHATML)
    expected = AutoTokenizer.from_pretrained(path).apply_chat_template(
        [USER], tokenize=False, add_generation_prompt=True
    )
    assert (
        render(CHATML, USER)
        == expected
        == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_joins_arguments_to_text_gets_them_as_text() -> None:
    source = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}"
        "{{ 'ARGS ' + call['function']['arguments'] }}{% endfor %}{% endfor %}"
    )
    text = ChatTemplate({"default": source}, SPECIAL).render(CHATS["tool call"])
    assert text == 'ARGS {"city": "Z\u00fcrich", "n": [1, null, 2.5]}'


def test_a_template_that_needs_a_content_gets_an_empty_one_beside_calls() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    for source in (
        "{{ messages[0].content + messages[0].tool_calls[0].function.name }}",
        "{{ messages[0].content + messages[0].tool_calls[0].function.arguments }}",
    ):
        text = ChatTemplate({"default": source}, SPECIAL).render([calls])
        assert text == ('{"x": 1}' if "arguments" in source else "f")
    with pytest.raises(InvalidRequestError):
        ChatTemplate({"default": "{{ 'x' + messages[0].content }}"}, SPECIAL).render([calls])


@pytest.mark.parametrize("content", [None, ""])
def test_a_template_that_knows_calls_by_a_null_content_gets_one(content: str | None) -> None:
    source = "{% for m in messages %}{% if m['content'] is none %}{{ m.tool_calls | length }}"
    source += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    call = {"function": {"name": "f", "arguments": {}}}
    calls = {"role": "assistant", "content": content, "tool_calls": [call]}
    assert ChatTemplate({"default": source}, SPECIAL).render([USER, calls]) == "hi1"


def test_what_filters_return_is_written_as_a_list() -> None:
    assert render("{{ messages | map(attribute='role') | tojson }}", USER) == '["user"]'


def continued(source: str, *messages: dict[str, Any]) -> str:
    template = ChatTemplate({"default": source}, SPECIAL)
    return template.render(messages, add_generation_prompt=False, continue_final_message=True)


def test_a_stripping_template_strips_before_the_continuation() -> None:
    last = {"role": "assistant", "content": "Once upon "}
    assert continued(CHATML, USER, last).endswith("<|im_start|>assistant\nOnce upon")


@pytest.mark.parametrize("content", ["The end", " a b ", "", "im", "\uf8ff\ue000\uf8ff x"])
def test_a_message_is_continued_at_its_own_end(content: str) -> None:
    last = {"role": "assistant", "content": content}
    text = continued(CHATML.replace(" | trim", ""), {"role": "user", "content": content}, last)
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{content}"


def test_what_the_template_does_not_show_cannot_be_continued() -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    for last in ({"role": "assistant", "content": None, "tool_calls": [call]}, USER):
        with pytest.raises(InvalidRequestError, match="continue"):
            continued("{{ messages | length }}", last)


def test_a_template_of_a_request_is_used_instead_and_bounded_as_the_models_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = ChatTemplate({"default": "own"}, SPECIAL)
    developer = {"role": "developer", "content": "x"}
    assert own.render([developer], chat_template="{{ messages[0].role }}{{ bos_token }}") == (
        "system<s>"
    )
    assert own.render([USER], chat_template="") == ""
    for source, words in [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "line 1"),
        ("x" * (chat_template.MAX_REQUEST_TEMPLATE_CHARS + 1), "limit"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "nested"),
    ]:
        with pytest.raises(InvalidRequestError, match=words) as caught:
            own.render([USER], chat_template=source)
        assert caught.value.param == "chat_template"
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 10)
    with pytest.raises(InvalidRequestError, match="more than 10"):
        own.render([USER], chat_template="{% for i in range(99) %}abc{% endfor %}")
