"""An HTTP/1.1 client that costs little and can misbehave: bytes out, replies in."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

MAX_LINE_BYTES = 1 << 20


class BrokenReply(Exception):
    """The server closed the connection in the middle of a reply, or sent what is not HTTP."""


class ConnectionEnded(BrokenReply):
    """The server closed the connection where a reply could have begun."""


@dataclass(slots=True)
class Reply:
    """header names are in lower case; the body is without its chunks' sizes."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def events(self) -> list[str]:
        """The data of the server-sent events that have arrived completely."""
        return events_of(self.body)

    def json(self) -> Any:
        return json.loads(self.body)


def events_of(body: bytes) -> list[str]:
    """The data of the complete events of a stream."""
    complete, _, _ = body.rpartition(b"\n\n")
    lines = complete.decode().split("\n")
    return [line[6:] for line in lines if line.startswith("data: ")]


class Connection:
    """One connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._begun = b""
        self.num_replies = 0

    @classmethod
    async def open(cls, host: str, port: int, receive_buffer: int | None = None) -> Connection:
        """receive_buffer: bytes that the kernel takes from the server while nobody reads."""
        if receive_buffer is None:
            return cls(*await asyncio.open_connection(host, port, limit=MAX_LINE_BYTES))
        connected = socket.socket()
        connected.setblocking(False)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(connected, (host, port))
        return cls(*await asyncio.open_connection(sock=connected, limit=receive_buffer))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def wait_for_reply(self) -> None:
        """Wait for the first byte of a reply. Raises ConnectionEnded if none comes any more."""
        if not self._begun:
            try:
                self._begun = await self._reader.readexactly(1)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                raise ConnectionEnded(f"the connection ended: {error}") from error

    async def read_head(self) -> Reply:
        """Raises ConnectionEnded as `wait_for_reply`, BrokenReply if what comes is not HTTP."""
        await self.wait_for_reply()
        status_line = self._begun + await self._line()
        self._begun = b""
        version, _, rest = status_line.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise BrokenReply(f"not a status line: {status_line[:80]!r}")
        headers: dict[str, str] = {}
        while line := await self._line():
            name, _, value = line.partition(b":")
            headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        status = int(rest[:3])
        self.num_replies += status >= 200
        return Reply(status, headers)

    async def chunks(self, reply: Reply) -> AsyncIterator[bytes]:
        """The parts of the reply's body as they come; they are added to the reply as well."""
        if reply.headers.get("transfer-encoding") == "chunked":
            while size := int(await self._line(), 16):
                chunk = (await self._exactly(size + 2))[:size]
                reply.body += chunk
                yield chunk
            await self._line()
        elif reply.status >= 200 and reply.status not in (204, 304):
            chunk = await self._exactly(int(reply.headers.get("content-length", 0)))
            reply.body += chunk
            yield chunk

    async def read_reply(self, *, has_body: bool = True) -> Reply:
        """A whole reply; without `has_body` it answers HEAD. Raises as `read_head`."""
        reply = await self.read_head()
        while reply.status == 100:
            reply = await self.read_head()
        if has_body:
            async for _ in self.chunks(reply):
                pass
        return reply

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        self._writer.transport.abort()

    async def _line(self) -> bytes:
        try:
            return (await self._reader.readuntil(b"\r\n"))[:-2]
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise BrokenReply(f"the connection ended: {error}") from error

    async def _exactly(self, num_bytes: int) -> bytes:
        try:
            return await self._reader.readexactly(num_bytes)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise BrokenReply(f"the connection ended: {error}") from error


def request_bytes(
    path: str,
    body: bytes | None = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> bytes:
    """A well-formed request; `headers` replace or extend the usual ones."""
    all_headers = {"Host": "127.0.0.1"}
    if body is not None:
        all_headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in (all_headers | (headers or {})).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def json_request(path: str, body: Any, **headers: str) -> bytes:
    return request_bytes(path, json.dumps(body).encode(), headers=headers)
