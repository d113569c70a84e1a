"""What a user does on the page, and what a user sees there."""

from __future__ import annotations

import re
from typing import Any


class ChatPage:
    """`page` is playwright's."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def send(self, text: str) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")

    def ask(self, text: str) -> str:
        """Send, wait for the end of the answer, and return what is shown of it."""
        self.send(text)
        self.wait_for_end()
        return self.answer

    def wait_for_end(self) -> None:
        self.page.wait_for_selector("#stop", state="hidden")
        self.page.wait_for_selector(".message[data-running]", state="detached")

    def wait_for_text(self) -> None:
        """Until an answer has begun, and goes on."""
        self.page.locator("[data-running] .prose").filter(has_text=re.compile(r"\S")).wait_for()

    @property
    def answer(self) -> str:
        text: str = self.page.locator(".message.assistant .prose").last.inner_text()
        return text

    @property
    def texts(self) -> list[str]:
        """Of all messages shown, those of the user as they are."""
        texts: list[str] = self.page.locator(".bubble, .prose").all_inner_texts()
        return texts

    @property
    def stats(self) -> dict[str, str]:
        """The figures under the last answer by name."""
        figures = self.page.locator(".message.assistant .stats").last.locator("div")
        pairs = [figures.nth(i).locator("dt, dd").all_inner_texts() for i in range(figures.count())]
        return dict(pairs)

    @property
    def stored(self) -> list[dict[str, Any]]:
        """The conversations that the browser keeps, the last one first."""
        found: list[dict[str, Any]] = self.page.evaluate(
            "async () => (await import('/page/storage.js')).loadConversations()"
        )
        return found

    def set(self, **fields: str) -> None:
        """Change settings by the names of their fields."""
        self.page.click("#open-settings")
        self.fill_settings(**fields)

    def fill_settings(self, **fields: str) -> None:
        for name, value in fields.items():
            self.page.fill(f"#settings [name={name}]", value)
        self.page.click("#settings-save")

    def message(self, index: int) -> Any:
        return self.page.locator(".message").nth(index)

    def press_button(self, index: int, name: str) -> None:
        """A button under the message with this index."""
        self.message(index).get_by_role("button", name=name, exact=True).click()
