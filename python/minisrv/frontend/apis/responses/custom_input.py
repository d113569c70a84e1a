"""Reads the text that a custom tool gets out of the arguments that the model writes for it."""

from __future__ import annotations

import json
import re

_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_TOKEN = re.compile(
    rf'(?P<text>[^"\\]+)|(?P<pair>{_HIGH}{_LOW})|\\u(?P<code>[0-9a-fA-F]{{4}})|\\(?P<char>.)',
    re.DOTALL,
)
# The end of a text that may be part of one token, or of the first half of a pair.
_UNSURE = re.compile(rf"(?:{_HIGH})?(?:\\(?:u[0-9a-fA-F]{{0,3}})?)?\Z")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", '"': '"', "\\": "\\", "/": "/"}


class CustomInput:
    """Arguments arrive in pieces, which may be cut anywhere; the text does not depend on where.

    {"input": "..."} is passed on as it arrives. What the model writes instead is read at the end:
    the only text of an object, or else everything as it is.
    """

    def __init__(self) -> None:
        self._text = ""
        self._begun = False
        self._ended = False

    def push(self, arguments: str) -> str:
        """The text that is certain now that `arguments` have arrived."""
        if self._ended:
            return ""
        self._text += arguments
        if not self._begun:
            head = _HEAD.match(self._text)
            if head is None:
                return ""
            self._begun = True
            self._text = self._text[head.end() :]
        return self._decode(final=False)

    def flush(self) -> str:
        """The rest, when no more will arrive."""
        return self._decode(final=True) if self._begun else _only_text(self._text)

    def _decode(self, *, final: bool) -> str:
        """Consume the string up to its closing quote, or up to what is not certain yet."""
        decoded, at = [], 0
        while not self._ended and at < len(self._text):
            if not final and _UNSURE.match(self._text, at):
                break
            token = _TOKEN.match(self._text, at)
            if token is None:  # the closing quote, or half an escape at the very end
                self._ended = True
                break
            decoded.append(_decoded(token))
            at = token.end()
        self._text = self._text[at:]
        return "".join(decoded)


def _decoded(token: re.Match[str]) -> str:
    if pair := token["pair"]:
        return json.loads(f'"{pair}"')  # type: ignore[no-any-return]
    if code := token["code"]:
        return _unicode(chr(int(code, 16)))
    if char := token["char"]:
        return _ESCAPED.get(char, token[0])
    return token[0]


def _only_text(arguments: str) -> str:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    texts = list(value.values()) if isinstance(value, dict) else []
    is_only = len(texts) == 1 and isinstance(texts[0], str)
    return _unicode(texts[0]) if is_only else arguments


def _unicode(text: str) -> str:
    """The text with a replacement for each surrogate without its other half."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
