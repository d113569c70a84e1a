"""HTTP as uvicorn reads it, with a bound on a request's head and errors in OpenAI's form."""

from __future__ import annotations

import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from minisrv.errors import InvalidRequestError
from minisrv.frontend.http.error_format import error_body

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100


class HttpProtocol(HttpToolsProtocol):
    """One connection. The application sees a request only when its head is complete and bounded."""

    _in_head = False
    _begun = False  # whether the head begins in the data at hand
    _too_large = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Parse the data; refuse a head that grows too large before it is complete."""
        # Data in which a head begins may also hold the end of another request; it is bounded.
        self._begun = False
        super().data_received(data)
        if self._in_head and not self._begun and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._too_large = True
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._begun, self._head_bytes = True, True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._too_large = True
            raise ValueError("the head is too large")  # becomes a parsing error
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read, and close."""
        status = HTTPStatus.BAD_REQUEST
        if self._too_large:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            msg = f"a request's head may have {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers"
        body = json.dumps(error_body(InvalidRequestError(msg)))
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write((head + body).encode("ascii"))
        self.transport.close()
