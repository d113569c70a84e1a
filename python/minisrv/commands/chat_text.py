"""Text of a model in a terminal: without control characters, Markdown in colours."""

from __future__ import annotations

import re
from collections.abc import Iterator

# All but the tab and the end of a line: escape sequences could rewrite what is on the screen, set
# the title or fill the clipboard; and marks that reorder text, which can hide what it says.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_ANSI = {"bold": 1, "dim": 2, "cyan": 36}
_HEADING = re.compile(r" {0,3}#{1,6}(?= )")


def printable(text: str) -> str:
    """The text without what a terminal would obey."""
    return _CONTROLS.sub("", text)


def coloured(text: str, style: str) -> str:
    """For a terminal. style: bold, dim, cyan or empty."""
    return f"\x1b[{_ANSI[style]}m{text}\x1b[0m" if style else text


class MarkdownStyle:
    """Styles Markdown as it arrives: each character is shown as the model wrote it, at once.

    Nothing is ever drawn again, so that narrow windows, resizing and copying do no harm.
    """

    def __init__(self) -> None:
        self._line = ""
        self._in_code_block = False
        self._in_code = self._in_bold = False

    def feed(self, text: str) -> Iterator[tuple[str, str]]:
        """Pieces that join to `text`, each with its style."""
        piece, style = "", ""
        for char in text:
            found = self._style_of(char)
            if found != style and piece:
                yield piece, style
                piece = ""
            piece, style = piece + char, found
        if piece:
            yield piece, style

    def _style_of(self, char: str) -> str:
        if char == "\n":
            if _FENCE.match(self._line):
                self._in_code_block = not self._in_code_block
            self._line, self._in_code, self._in_bold = "", False, False
            return ""
        before, self._line = self._line, self._line + char
        if self._in_code_block or _FENCE.match(self._line):
            return "cyan"
        if char == "`":
            self._in_code = not self._in_code
            return "cyan"
        if self._in_code:
            return "cyan"
        if _HEADING.match(self._line):
            return "bold"
        # Two asterisks are bold if a text follows at once, and end where they come again.
        if before.endswith("**") and not before.endswith("***") and char != "*":
            self._in_bold = not self._in_bold and not char.isspace()
        return "bold" if self._in_bold else ""
