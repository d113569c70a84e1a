"""Inflates a body that was sent with `Content-Encoding: gzip`, only as far as it is read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from minisrv.errors import InvalidRequestError

CODINGS = ("gzip", "x-gzip")
_GZIP_WBITS = 16 + zlib.MAX_WBITS
# Inflating this much takes some 0.2 ms.
_PIECE_BYTES = 2**16


class GzipBody:
    """One gzip stream of one member, in pieces as they arrive. Raises InvalidRequestError."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(_GZIP_WBITS)

    def inflate(self, data: bytes) -> Iterator[bytes]:
        """What `data` adds, in pieces; the caller may stop at any of them."""
        while data:
            if self._stream.eof:
                raise _wrong("it goes on behind its end")
            try:
                piece = self._stream.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                raise _wrong(str(error)) from None
            data = self._stream.unconsumed_tail or self._stream.unused_data
            yield piece

    def end(self) -> None:
        """Check that the stream is complete."""
        if not self._stream.eof:
            raise _wrong("it breaks off")


def _wrong(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"the body is not gzip, as its Content-Encoding says: {problem}")
