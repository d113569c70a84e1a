"""A proxy on 127.0.0.1 that keeps what a client sends and gets, byte for byte."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

_OWN_HEADERS = ("host", "content-length", "connection", "accept-encoding", "transfer-encoding")


@dataclass
class Exchange:
    """One request and its reply; `reply` is empty until it has ended."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0
    reply_headers: dict[str, str] = field(default_factory=dict)
    reply: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def route(self) -> str:
        """The path without its query."""
        return self.path.partition("?")[0]


@dataclass
class Recording:
    """url: what the client is given in place of the server's."""

    url: str
    exchanges: list[Exchange]

    def generations(self) -> list[Exchange]:
        """The requests for a reply of the model."""
        routes = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions")
        return [exchange for exchange in self.exchanges if exchange.route in routes]


@contextlib.contextmanager
def recording(server_url: str) -> Iterator[Recording]:
    """Passes everything on to the server."""
    exchanges: list[Exchange] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            exchange = Exchange(self.command, self.path, dict(self.headers), body)
            exchanges.append(exchange)
            passed_on = [
                (name, value)
                for name, value in self.headers.items()
                if name.lower() not in _OWN_HEADERS
            ]
            passed_on.append(("accept-encoding", "identity"))
            url = server_url + self.path
            with (
                contextlib.suppress(ConnectionError),
                httpx.Client(timeout=120, trust_env=False) as http,
                http.stream(self.command, url, headers=passed_on, content=body) as response,
            ):
                self._pass_back(exchange, response)

        def _pass_back(self, exchange: Exchange, response: httpx.Response) -> None:
            exchange.reply_headers = dict(response.headers)
            self.send_response(response.status_code)
            for name, value in response.headers.items():
                if name not in _OWN_HEADERS:
                    self.send_header(name, value)
            self.send_header("connection", "close")
            self.end_headers()
            pieces = []
            for piece in response.iter_raw():
                pieces.append(piece)
                self.wfile.write(piece)
            exchange.reply = b"".join(pieces)
            exchange.status = response.status_code
            self.close_connection = True

        do_GET = do_POST = do_HEAD = do_DELETE = answer

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Recording(f"http://127.0.0.1:{proxy.server_address[1]}", exchanges)
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
