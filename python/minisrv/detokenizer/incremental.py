"""Token ids to text, one id at a time: the pieces join to what decode(ids) gives.

No piece ends inside a character. Two ways, by the decoder that tokenizer.json names:

- ByteLevel: a token is bytes, known from its spelling; an incremental UTF-8 decoder keeps what
  may become a character. It replaces invalid bytes as the `tokenizers` library does.
- All others: the text that a token adds depends only on the token before it, and on being first.
  So it is decode([before, token]) without decode([before]), where `before` gives text by itself.
  A run of byte tokens (ByteFallback) is valid or not as a whole: it is decoded at its end.

Both cost O(1) per token.
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
        self.spell = cache(self._spell)
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

    def _spell(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; a special token as it is written.

        They may be a part of a character. They keep a leading space, which the text of a request
        that begins with the token may lack.
        """
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


class _TokenBytes(dict[int, bytes]):
    """Bytes by token id, for a ByteLevel decoder; filled on demand."""

    def __init__(self, tokenizer: HFTokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._skipped:
            token = ""
        try:
            spelled = bytes([_BYTE_OF_CHAR[char] for char in token])
        except KeyError:  # an added token is spelled as it is
            spelled = token.encode()
        self[token_id] = spelled
        return spelled


class _ByteLevelStream:
    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: _TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain after `token_id`."""
        return self._decoder.decode(self._token_bytes[token_id])

    def flush_whole(self) -> str:
        """Text of whole characters that is held back: none here."""
        return ""

    def flush(self) -> str:
        """The rest of the text, after the last id."""
        return self._decoder.decode(b"", True)


class _TokenTexts(dict[int, tuple[bool, bool, str]]):
    """For decoders that work on text: is an id left out, is it a byte, and its text when alone.

    Filled on demand.
    """

    def __init__(self, tokenizer: HFTokenizer, skipped: frozenset[int], has_bytes: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._has_bytes = has_bytes

    def __missing__(self, token_id: int) -> tuple[bool, bool, str]:
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._skipped:
            known = (True, False, "")
        else:
            is_byte = self._has_bytes and _BYTE_TOKEN.fullmatch(token) is not None
            known = (False, is_byte, self.decode([token_id]))
        self[token_id] = known
        return known

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
        """The text that is certain after `token_id`."""
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
        """Text of whole characters that is held back: a run of bytes, so far."""
        held = self._texts.decode(self._window)[self._num_shown :]
        return "" if "\ufffd" in held else self.flush()

    def flush(self) -> str:
        """The rest of the text, after the last id."""
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
