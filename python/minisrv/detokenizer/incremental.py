"""Token ids to text, one id at a time: the pieces join to the decoded whole, whatever the ids.

No piece ends inside a character. Two ways, by the decoder that tokenizer.json names:

- ByteLevel: a token is bytes, known from its spelling; an incremental UTF-8 decoder keeps what
  may become a character. It replaces invalid bytes as the `tokenizers` library does.
- All others: what a token adds depends on the token before it at most, and on being first. So it
  is decode([before, token]) without decode([before]), where `before` gives text of its own. A run
  of byte tokens (ByteFallback) is valid or not as a whole: it is decoded when it has ended.

Both cost O(1) a token.
"""

from __future__ import annotations

import codecs
import re
from functools import cache
from typing import Any

from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.errors import UnsupportedModelError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOCAL_STEPS = frozenset(
    {"BPEDecoder", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
)


class TextDecoder:
    """One tokenizer's way to decode, with the tables that its requests share.

    Raises UnsupportedModelError for a decoder in which a later token can change earlier text.
    """

    def __init__(self, tokenizer: HFTokenizer) -> None:
        steps = _decoder_steps(tokenizer.decoder_state)
        self._is_byte_level = [step["type"] for step in steps] == ["ByteLevel"]
        if not self._is_byte_level:
            _check_local(steps)
        has_bytes = any(step["type"] == "ByteFallback" for step in steps)
        self._tokenizer = tokenizer
        self._special_ids = tokenizer.special_ids
        self._spelled: dict[int, bytes] = {}
        self._bytes = cache(lambda skipped: _TokenBytes(tokenizer, skipped))
        self._texts = cache(lambda skipped: _TokenTexts(tokenizer, skipped, has_bytes))

    def stream(
        self, skip_special_tokens: bool, kept_ids: frozenset[int] = frozenset()
    ) -> TextStream:
        """A new request's stream; `kept_ids` are text also where special tokens are left out."""
        skipped = self._special_ids - kept_ids if skip_special_tokens else frozenset()
        if self._is_byte_level:
            return _ByteLevelStream(self._bytes(skipped))
        return _WindowStream(self._texts(skipped))

    def spell(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, special tokens as they are written.

        It may be a part of a character. A space at its front is there, though the text of a request
        that begins with it may not have it.
        """
        known = self._spelled.get(token_id)
        if known is None:
            known = self._spelled[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        if self._is_byte_level:
            return self._bytes(frozenset())[token_id]
        texts = self._texts(frozenset())
        left_out, is_byte, alone = texts[token_id]
        if left_out:
            return b""
        if is_byte:
            token = self._tokenizer.token(token_id)
            assert token is not None
            return bytes([int(token[3:5], 16)])
        return texts.decode([token_id, token_id])[len(alone) :].encode()


class _TokenBytes:
    """Bytes by token id, for a ByteLevel decoder; filled as ids are met."""

    def __init__(self, tokenizer: HFTokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._skipped:
            return b""
        try:
            return bytes([_BYTE_OF_CHAR[char] for char in token])
        except KeyError:  # an added token is spelled as it is
            return token.encode()


class _ByteLevelStream:
    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: _TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is sure now that `token_id` has come."""
        return self._decoder.decode(self._token_bytes[token_id])

    def flush_whole(self) -> str:
        """Text that is held back though no character is missing in it: there is none here."""
        return ""

    def flush(self) -> str:
        """The rest of the text, when no more ids will come."""
        return self._decoder.decode(b"", True)


class _TokenTexts:
    """What is known of single tokens, for the decoders that work on text; filled as ids come."""

    def __init__(self, tokenizer: HFTokenizer, skipped: frozenset[int], has_bytes: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._has_bytes = has_bytes
        self._known: dict[int, tuple[bool, bool, str]] = {}

    def __getitem__(self, token_id: int) -> tuple[bool, bool, str]:
        """Whether the id is left out, whether it is a byte, and its text when it stands alone."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> tuple[bool, bool, str]:
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._skipped:
            return True, False, ""
        is_byte = self._has_bytes and _BYTE_TOKEN.fullmatch(token) is not None
        return False, is_byte, self.decode([token_id])

    def decode(self, ids: list[int]) -> str:
        """Text of ids none of which is left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class _WindowStream:
    """Decodes a window: context tokens, whose text has been shown, and those after them.

    The context is the last token that gives text alone; before there is one, the tokens from the
    start to the first text. It ends no byte run.
    """

    __slots__ = ("_context", "_num_shown", "_texts", "_window")

    def __init__(self, texts: _TokenTexts) -> None:
        self._texts = texts
        self._context: list[int] = []
        self._window: list[int] = []
        self._num_shown = 0

    def push(self, token_id: int) -> str:
        """The text that is sure now that `token_id` has come."""
        left_out, is_byte, alone = self._texts[token_id]
        if left_out:
            return ""
        self._window.append(token_id)
        if is_byte:
            return ""
        text = self._texts.decode(self._window)
        delta = text[self._num_shown :]
        self._move_to(token_id, alone, text)
        return delta

    def flush_whole(self) -> str:
        """Text that is held back though no character is missing in it: a run of bytes, so far."""
        text = self._texts.decode(self._window)
        delta = text[self._num_shown :]
        if "\ufffd" in delta:
            return ""
        self._num_shown = len(text)
        return delta

    def flush(self) -> str:
        """The rest of the text, when no more ids will come."""
        text = self._texts.decode(self._window)
        delta, self._num_shown = text[self._num_shown :], len(text)
        return delta

    def _move_to(self, token_id: int, alone: str, text: str) -> None:
        """Make `token_id` the last token whose text, with all before it, has been shown."""
        if alone:
            self._context = [token_id]
            self._window = [token_id]
            self._num_shown = len(alone)
        elif self._context:
            self._window = [*self._context, token_id]
            self._num_shown = len(self._texts.decode(self._window))
        elif text:
            self._context = list(self._window)
            self._num_shown = len(text)


TextStream = _ByteLevelStream | _WindowStream


def _decoder_steps(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    if state is None:
        return []
    if state["type"] != "Sequence":
        return [state]
    return [step for inner in state["decoders"] for step in _decoder_steps(inner)]


def _check_local(steps: list[dict[str, Any]]) -> None:
    fused = False
    for step in steps:
        fused = fused or step["type"] == "Fuse"
        is_local = step["type"] in _LOCAL_STEPS
        if step["type"] == "Strip":
            is_local = not step["stop"]
        elif step["type"] == "Replace" and fused:
            is_local = len(step["pattern"].get("String", "  ")) == 1
        if not is_local:
            raise UnsupportedModelError(
                f"the tokenizer's decoder has a step that cannot be streamed: {step}"
            )


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the rest from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
