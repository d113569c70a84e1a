"""What the page makes of answers: Markdown, reasoning, calls, JSON, and nothing that runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.chat_page import ChatPage
from tests.support.http_server import HttpServer, serve

MARKDOWN = """\
# Title

Some *text* with `a < b` and [a link](https://example.org/x).

```python
print("<b>" if 1 < 2 else "&amp;")
```

| name | value |
|---|---:|
| one | 1 |

- [x] done
- first
  1. inner

> quoted &lt;3
"""
PAYLOADS = [
    "<script>window.hit = 1</script>",
    "<img src=https://evil.example/a.png onerror='window.hit=1'>",
    "<svg onload=window.hit=1><style>@import 'https://evil.example/s.css'</style></svg>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "<link rel=stylesheet href=https://evil.example/b.css><base href=https://evil.example/>",
    "![picture](https://evil.example/c.png) ![p](data:image/svg+xml,<svg/onload=hit=1>)",
    "[run](javascript:window.hit=1) [run](JaVaScRiPt:hit=1) [x](data:text/html,<b>) [](vbscript:x)",
    '[ref]\n\n[ref]: javascript:window.hit=1 "title"',
    "<a href='javascript:window.hit=1' onclick='hit=1'>x</a> <javascript:window.hit=1>",
    '```html" onclick=window.hit=1\n</code></pre><script>hit=1</script>\n```',
    "| <img src=x onerror=hit=1> | b |\n|---|---|\n| <script>hit=1</script> | ![](//evil.x) |",
    "<div style='background:url(https://evil.example/d.png)'>x</div><math><mi xlink:href=x>",
]
# Nothing in the conversation but what the page itself makes.
FOREIGN = """() => [...document.querySelectorAll('#messages *, #chats *, #title *, #banner *')]
    .filter((e) => /^(script|img|iframe|object|embed|link|style|base|form|video|audio|math)$/i
            .test(e.tagName)
        || e.getAttributeNames().some((name) => name.startsWith('on') || name === 'style')
        || (e.tagName === 'A' && !/^(https?|mailto):/.test(e.href))
        || (e.tagName === 'use' && !e.getAttribute('href').startsWith('page/')))
    .map((e) => e.outerHTML)"""


def assert_harmless(chat: ChatPage) -> None:
    assert chat.page.evaluate(FOREIGN) == []
    assert chat.page.evaluate("() => window.hit") is None


def ask(played: HttpServer, chat: ChatPage, text: str, question: str = "Go on") -> str:
    played.backend.text = text
    return chat.ask(question)


def test_markdown_becomes_elements(played: HttpServer, opened: Any) -> None:
    chat = opened(played.url)
    ask(played, chat, MARKDOWN)
    prose = chat.page.locator(".prose")
    assert prose.locator("h3").inner_text() == "Title"
    assert prose.locator("pre").inner_text() == 'print("<b>" if 1 < 2 else "&amp;")'
    assert prose.locator(".code-header span").inner_text() == "python"
    assert prose.locator("p code").inner_text() == "a < b"
    assert prose.locator("td").all_inner_texts() == ["one", "1"]
    assert prose.locator("blockquote").inner_text() == "quoted <3"
    assert prose.locator("li input").is_checked()
    assert prose.locator("li ol li").inner_text() == "inner"
    link = prose.locator("a")
    assert link.get_attribute("href") == "https://example.org/x"
    assert "noopener" in link.get_attribute("rel")
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    prose.get_by_role("button", name="Copy code").click()
    copied = chat.page.evaluate("() => navigator.clipboard.readText()")
    assert copied == 'print("<b>" if 1 < 2 else "&amp;")'


def test_a_text_that_grows_is_shown_as_the_whole_text(played: HttpServer, opened: Any) -> None:
    chat = opened(played.url)
    grown, whole = chat.page.evaluate(
        """async (text) => {
            const { MarkdownView } = await import('/page/markdown.js');
            const [grown, whole] = [document.createElement('div'), document.createElement('div')];
            const view = new MarkdownView(grown);
            for (let end = 1; end <= text.length; end++) view.show(text.slice(0, end));
            new MarkdownView(whole).show(text);
            return [grown.outerHTML, whole.outerHTML];
        }""",
        MARKDOWN * 2 + "\r\nline\r\n\r\n" + "\n\n".join(PAYLOADS),
    )
    assert grown == whole


def test_payloads_in_answers_run_nothing_and_load_nothing(played: HttpServer, opened: Any) -> None:
    chat = opened(played.url)
    ask(played, chat, "\n\n".join(PAYLOADS), question=PAYLOADS[0] + PAYLOADS[1])
    assert_harmless(chat)
    assert "<script>window.hit = 1</script>" in chat.answer
    assert PAYLOADS[0] in chat.page.locator("#title").inner_text()
    ask(played, chat, f"<think>{' '.join(PAYLOADS)}</think>{PAYLOADS[3][:20]}")
    assert PAYLOADS[3][:20] in chat.answer
    assert_harmless(chat)
    # As they arrive, with tags that are not closed yet.
    chat.page.evaluate(
        """async (payloads) => {
            const { MarkdownView } = await import('/page/markdown.js');
            for (const text of payloads) {
                const shown = document.createElement('div');
                document.getElementById('messages').append(shown);
                new MarkdownView(shown).show(text);
            }
        }""",
        [payload[:end] for payload in PAYLOADS for end in range(5, len(payload), 7)],
    )
    assert_harmless(chat)
    chat.page.reload()
    chat.page.wait_for_selector(".message")
    assert_harmless(chat)


def test_payloads_in_calls_and_errors_run_nothing(played: HttpServer, opened: Any) -> None:
    chat = opened(played.url)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    chat.set(tools=json.dumps([tool]))
    calls = [json.dumps({"name": one, "arguments": {one: one}}) for one in PAYLOADS]
    ask(played, chat, "".join(f"<tool_call>{call}</tool_call>" for call in calls))
    shown = chat.page.locator(".call-name strong").all_inner_texts()
    assert [name.split() for name in shown] == [payload.split() for payload in PAYLOADS]
    assert_harmless(chat)
    chat.set(tools=json.dumps([{**tool, "type": PAYLOADS[1]}]))
    chat.page.click("#new-chat")
    chat.send(PAYLOADS[2])
    chat.page.locator("#messages .note.error").get_by_text("evil.example").wait_for()
    assert_harmless(chat)


def test_a_call_gets_its_result_and_the_answer_follows(played: HttpServer, opened: Any) -> None:
    chat = opened(played.url)
    function = {"name": "get_time", "parameters": {"type": "object"}}
    chat.set(tools=json.dumps([{"type": "function", "function": function}]))
    ask(
        played,
        chat,
        '<think>It wants the time.</think><tool_call>{"name": "get_time", "arguments": '
        '{"city": "Oslo"}}</tool_call>',
    )
    assert chat.page.locator(".call-name strong").inner_text() == "get_time"
    assert chat.page.locator(".call pre").inner_text() == '{"city": "Oslo"}'
    reasoning = chat.page.locator("details.fold")
    assert not reasoning.locator(".thought").is_visible()
    reasoning.locator("summary").click()
    assert reasoning.locator(".thought").inner_text() == "It wants the time."
    played.backend.text = "It is 14:05."
    chat.page.get_by_label("Result of get_time").fill("14:05")
    chat.page.get_by_role("button", name="Send results").click()
    chat.wait_for_end()
    assert chat.answer == "It is 14:05."
    prompt = played.backend.prompts[-1]
    assert "CALL get_time" in prompt
    assert prompt.index("Oslo") < prompt.index("14:05")


def test_json_follows_the_schema_and_is_laid_out(played: HttpServer, opened: Any) -> None:
    chat = opened(played.url)
    chat.page.click("#open-settings")
    chat.fill_settings(schema='{"type": ')
    fault = chat.page.locator("#settings-fault")
    assert fault.inner_text().startswith("The JSON schema must be an object in JSON:")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    chat.fill_settings(schema=json.dumps(schema), temperature="0.5", stop="END")
    ask(played, chat, '{"a":1}')
    assert chat.page.locator(".prose pre").inner_text() == '{\n  "a": 1\n}'
    sampling = played.backend.messages[-1].sampling
    assert sampling.temperature == 0.5
    assert sampling.stop == ("END",)
    grammar = played.backend.grammars[-1]
    assert grammar is not None
    assert json.loads(grammar.text) == schema


@pytest.fixture(scope="module")
def guarded() -> Iterator[HttpServer]:
    with serve(api_key=("secret",), admin_key="master") as server:
        yield server


def test_a_wrong_key_is_asked_for_again(guarded: HttpServer, opened: Any) -> None:
    chat = opened(guarded.url)
    banner = chat.page.locator("#banner")
    banner.get_by_text("This server needs a key. Enter one to go on.").wait_for()
    chat.fill_settings(key="wrong")
    banner.get_by_text("The server does not know this key. Enter another one.").wait_for()
    chat.fill_settings(key="secret")
    banner.wait_for(state="hidden")
    assert chat.ask("hi").startswith("Hello from the")
    assert "admin key" in chat.page.locator("#tree-note").inner_text()
    chat.set(key="master")
    chat.page.locator("#tree-note").get_by_text("The cache is empty.").wait_for()
    assert "secret" not in json.dumps(chat.stored)


def test_errors_are_sentences(guarded: HttpServer, opened: Any) -> None:
    chat = opened(guarded.url)
    chat.page.wait_for_selector("#settings[open]")
    chat.fill_settings(key="secret")
    for word, sentence in (
        ("refuse", "This model's maximum context length is 8 tokens."),
        ("break", "Broken."),
    ):
        chat.ask(word)
        assert chat.page.locator("#messages .note.error").last.inner_text() == sentence
    chat.page.context.set_offline(True)
    chat.ask("hello?")
    sentence = "The server cannot be reached. Is it still running?"
    assert chat.page.locator("#messages .note.error").last.inner_text() == sentence
    chat.page.context.set_offline(False)
