"""The page as a whole: its width, its keys, its speed, and whether everybody can use it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.browser.chat_page import ChatPage
from tests.browser.test_shown import MARKDOWN
from tests.support.http_server import HttpServer
from tests.support.server_process import wait_until

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
SERIOUS = """async () => {
    const { violations } = await axe.run();
    return violations
        .filter(({ impact }) => impact === 'serious' || impact === 'critical')
        .map(({ id, nodes }) => `${id}: ${nodes.map((n) => n.html.slice(0, 150)).join(' | ')}`);
}"""


def talk(played: HttpServer, chat: ChatPage) -> None:
    """An answer with everything that one can have."""
    function = {"name": "get_time", "parameters": {"type": "object"}}
    chat.set(tools=json.dumps([{"type": "function", "function": function}]))
    played.backend.text = f"<think>Hm.</think>{MARKDOWN}\n\n| wide |\n|---|\n| {'x' * 300} |"
    chat.ask("Show me " + "everything " * 20)
    chat.press_button(1, "Answer again")
    chat.wait_for_end()
    played.backend.text = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    chat.ask("And a call")


@pytest.mark.parametrize(
    "options",
    [pytest.param({"color_scheme": "dark"}, marks=pytest.mark.soak), PHONE],
    ids=["dark", "phone"],
)
def test_axe_finds_no_serious_fault(
    played: HttpServer, opened: Any, axe: str, options: dict[str, Any]
) -> None:
    chat = opened(played.url, bypass_csp=True, **options)
    chat.page.add_script_tag(content=axe)
    assert chat.page.evaluate(SERIOUS) == []
    talk(played, chat)
    chat.page.locator("details.fold summary").first.click()
    assert chat.page.evaluate(SERIOUS) == []
    chat.page.click("#theme")
    if "is_mobile" in options:
        chat.page.click("#open-engine")
    assert chat.page.evaluate(SERIOUS) == []
    if "is_mobile" not in options:
        chat.page.click("#open-settings")
        assert chat.page.evaluate(SERIOUS) == []


def test_a_phone_shows_a_chat_without_scrolling_sideways(played: HttpServer, opened: Any) -> None:
    chat = opened(played.url, **PHONE)
    talk(played, chat)
    sideways = "() => document.documentElement.scrollWidth - innerWidth"
    assert chat.page.evaluate(sideways) <= 0
    wide = "() => document.getElementById('scroller').scrollWidth - innerWidth"
    assert chat.page.evaluate(wide) <= 0
    for button, panel in (("#menu", "#sidebar"), ("#open-engine", "#engine")):
        assert not chat.page.locator(panel).is_visible()
        chat.page.click(button)
        assert chat.page.locator(panel).is_visible()
        chat.page.mouse.click(*((350, 700) if panel == "#sidebar" else (5, 700)))
        assert not chat.page.locator(panel).is_visible()
    chat.page.click("#menu")
    chat.page.click("#new-chat")
    assert not chat.page.locator("#sidebar").is_visible()
    assert chat.page.locator("#empty").is_visible()


def test_the_page_can_be_used_by_keyboard(played: HttpServer, opened: Any) -> None:
    chat = opened(played.url)
    played.backend.text = "An answer."
    keyboard = chat.page.keyboard
    chat.page.locator("#model", has_text="org/tiny").wait_for()
    assert chat.page.evaluate("() => document.activeElement.id") == "input"
    keyboard.type("one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    keyboard.press("Enter")
    chat.wait_for_end()
    assert chat.texts == ["one\ntwo", "An answer."]
    chat.page.locator("#scroller").focus()
    keyboard.press("/")
    assert chat.page.evaluate("() => document.activeElement.id") == "input"
    assert chat.page.locator("#engine").is_visible()
    keyboard.press("Control+Shift+E")
    assert not chat.page.locator("#engine").is_visible()
    keyboard.press("Control+Shift+O")
    assert chat.texts == []
    chat.page.locator(".chat").focus()
    keyboard.press("Enter")
    assert chat.texts == ["one\ntwo", "An answer."]


def test_a_tree_of_ten_thousand_nodes_is_drawn_in_a_tenth_of_a_second(
    played: HttpServer, opened: Any
) -> None:
    chat = opened(played.url)
    # The best of some, since other tests use the machine.
    draws = chat.page.evaluate(
        """async () => {
            const { TreeView } = await import('/page/tree_view.js');
            const nodes = Array.from({ length: 10000 }, (_, i) => ({
                id: i + 1, parent: i < 50 ? 0 : 1 + ((i * 7919) % Math.floor(i / 3)),
                tokens: 16 + (i % 7) * 16, pages: 1 + (i % 7), pins: i % 400 ? 0 : 1,
                last_use_s: i % 90,
            }));
            const canvas = document.getElementById('tree');
            const view = new TreeView(canvas, document.getElementById('tree-tip'), () => {});
            const times = [];
            for (let round = 0; round < 8; round++) {
                const began = performance.now();
                view.show(nodes, [1, 2]);
                canvas.getContext('2d').getImageData(0, 0, 1, 1);  // until it is drawn
                times.push(performance.now() - began);
            }
            return { times, drawn: view.blocks.length };
        }"""
    )
    assert draws["drawn"] == 10_000
    assert min(draws["times"]) < 100, draws


@pytest.mark.soak
def test_two_hundred_messages_do_not_slow_the_page(played: HttpServer, opened: Any) -> None:
    chat = opened(played.url)
    chat.page.evaluate(
        """async (text) => {
            const { add, newConversation } = await import('/page/conversation.js');
            const { saveConversation } = await import('/page/storage.js');
            const long = newConversation();
            for (let i = 0; i < 100; i++) {
                add(long, long.head, { role: 'user', content: `Question ${i}` });
                add(long, long.head, { role: 'assistant', content: text });
            }
            await saveConversation(long);
        }""",
        MARKDOWN,
    )
    chat.page.reload()
    chat.page.wait_for_selector(".message")
    assert chat.page.locator(".message").count() == 200
    frames = """async () => {
        const times = [];
        const scroller = document.getElementById('scroller');
        for (let i = 0; i < 40; i++) {
            const began = performance.now();
            scroller.scrollTop -= 400;
            await new Promise(requestAnimationFrame);
            await new Promise((resolve) => setTimeout(resolve));
            times.push(performance.now() - began);
        }
        return times.sort((a, b) => a - b)[10];
    }"""
    assert chat.page.evaluate(frames) < 100
    played.backend.text = MARKDOWN
    chat.ask("One more")
    assert chat.page.locator(".message").count() == 202
    at_end = """() => {
        const { scrollHeight, scrollTop, clientHeight } = document.getElementById('scroller');
        return scrollHeight - scrollTop - clientHeight;
    }"""
    wait_until(lambda: chat.page.evaluate(at_end) < 60)
