"""Limits what a body may cost to parse, before anything is built from it.

Parsing, checking and packing hold the event loop, for a time that grows with the number of JSON
values rather than with the number of bytes. So values are counted while the body arrives.
"""

from __future__ import annotations

import re

from minisrv.errors import InvalidRequestError

MAX_VALUES = 2**15
MAX_TOKEN_IDS = 2**18
MAX_LONG_DIGITS = 2**16
# Counting this much takes some 0.1 ms, for the most costly texts 3 ms. A body that is not larger is
# not counted: every value takes two bytes.
PIECE_BYTES = 2 * MAX_VALUES

_NOT_STRUCTURE = b"-0123456789 \t\r\n"
_INTEGERS = re.compile(rb",{8,}")  # the commas of an array without its numbers
_ALL_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 20


class BodySize:
    """The number of values in a JSON text, counted piece by piece.

    An empty array or object counts as two values. Integers in an array of nothing else are counted
    apart, as token ids, except in very short arrays. A text that is not JSON may be counted wrongly
    from its first error on, where the parser stops.
    """

    def __init__(self) -> None:
        self.num_values = 0
        self.num_token_ids = 0
        self.num_long_digits = 0
        self._in_string = False
        self._backslash = b""  # of an escape that the next piece completes

    def add(self, piece: bytes | bytearray) -> None:
        """Count a piece."""
        text = self._backslash + piece
        is_cut = (len(text) - len(text.rstrip(b"\\"))) % 2 == 1
        self._backslash = b"\\" if is_cut else b""
        text = text.removesuffix(self._backslash).replace(rb"\\", b"").replace(rb"\"", b"")
        parts = text.split(b'"')
        outside = b'"'.join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        self._count(outside)

    def _count(self, text: bytes) -> None:
        """Count what stands outside strings, each of which is a quotation mark here."""
        structure = text.translate(None, _NOT_STRUCTURE)
        num_integers = sum(map(len, _INTEGERS.findall(structure)))
        # The first value of an array or object follows a bracket, every other one a comma.
        num_values = structure.count(b"[") + structure.count(b"{") + structure.count(b",")
        self.num_values += num_values - num_integers
        self.num_token_ids += num_integers
        zeros = text.translate(_ALL_ZEROS)
        if _LONG_NUMBER in zeros:
            self.num_long_digits += sum(map(len, re.findall(_LONG_NUMBER + b"+", zeros)))

    @property
    def fits(self) -> bool:
        """Whether all counts are within their limits."""
        return (
            self.num_values <= MAX_VALUES
            and self.num_token_ids <= MAX_TOKEN_IDS
            and self.num_long_digits <= MAX_LONG_DIGITS
        )

    def check(self) -> None:
        """Raise InvalidRequestError for a count beyond its limit."""
        if self.num_values > MAX_VALUES:
            raise InvalidRequestError(
                f"the body has more than {MAX_VALUES} JSON values, the limit; strings may be long, "
                "and token ids are not counted"
            )
        if self.num_token_ids > MAX_TOKEN_IDS:
            raise InvalidRequestError(
                f"the body has more than {MAX_TOKEN_IDS} integers in arrays, the limit; send fewer "
                "token ids, or text"
            )
        if self.num_long_digits > MAX_LONG_DIGITS:
            raise InvalidRequestError(
                f"the numbers of 20 or more digits in the body have more than {MAX_LONG_DIGITS} "
                "digits together, the limit"
            )
