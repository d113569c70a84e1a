"""A server with OpenAI's API that sends its tokens at given times, for what measures servers.

Run as a process of its own: python -m tests.support.paced_server FIRST_S GAP_S TOKENS_PER_CHUNK;
it prints its URL. The first chunk of a reply is due FIRST_S after its request has arrived, and each
further one GAP_S after the one before. A token of a prompt is an id or a word. GET /requests
returns what was sent so far: the bodies, and when each request arrived and each chunk was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from tests.support.server_process import PYTHONPATH, ROOT


@dataclass
class Served:
    """One request. Times are of CLOCK_MONOTONIC, in seconds."""

    body: dict[str, Any]
    arrived_s: float
    written_s: list[float] = field(default_factory=list)


@dataclass
class PacedServer:
    """A running server, as a test sees it."""

    url: str

    def requests(self) -> list[Served]:
        """All requests of replies so far, in the order of their arrival."""
        with urllib.request.urlopen(f"{self.url}/requests", timeout=30) as response:
            return [Served(**served) for served in json.load(response)]


@contextlib.contextmanager
def paced_server(first_s: float, gap_s: float, tokens_per_chunk: int = 1) -> Iterator[PacedServer]:
    """Runs as long as the context."""
    arguments = [str(first_s), str(gap_s), str(tokens_per_chunk)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.paced_server", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": PYTHONPATH},
    )
    try:
        assert process.stdout is not None
        yield PacedServer(process.stdout.readline().strip())
    finally:
        process.terminate()
        process.communicate(timeout=30)


@dataclass
class _Pace:
    first_s: float
    gap_s: float
    tokens_per_chunk: int
    served: list[Served] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The requests of one connection."""
        # uvloop raises RuntimeError for a connection that the client has closed.
        gone = (ConnectionError, asyncio.IncompleteReadError, RuntimeError)
        with contextlib.suppress(*gone):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                arrived = time.monotonic()
                lines = head.lower().split("\r\n")
                lengths = [line.split(":")[1] for line in lines if "content-length" in line]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                await self._reply(head.split()[1], body, arrived, writer)
        writer.close()

    async def _reply(
        self, path: str, body: bytes, arrived: float, writer: asyncio.StreamWriter
    ) -> None:
        match path:
            case "/v1/models":
                _write_json(
                    writer, {"object": "list", "data": [{"id": "paced", "object": "model"}]}
                )
            case "/health":
                _write_json(writer, {})
            case "/requests":
                _write_json(writer, [asdict(served) for served in self.served])
            case "/v1/completions" | "/v1/chat/completions":
                self.served.append(Served(json.loads(body), arrived))
                await self._stream(self.served[-1], "chat" in path, writer)
            case _:
                _write_json(writer, {"error": {"message": f"no route {path}"}}, "404 Not Found")

    async def _stream(self, served: Served, chat: bool, writer: asyncio.StreamWriter) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        wanted = served.body.get("max_tokens") or served.body.get("max_completion_tokens") or 16
        left, due = wanted, served.arrived_s + self.first_s
        while left > 0:
            await asyncio.sleep(due - time.monotonic())
            count = min(left, self.tokens_per_chunk)
            left -= count
            text = " token" * count
            given = {"delta": {"content": text}} if chat else {"text": text}
            choice = {"index": 0, "finish_reason": None if left else "length", **given}
            served.written_s.append(time.monotonic())
            _write_event(writer, {"model": "paced", "choices": [choice]})
            due += self.gap_s
        prompt = _num_tokens(served.body)
        usage = {"prompt_tokens": prompt, "completion_tokens": wanted}
        usage["total_tokens"] = prompt + wanted
        _write_event(writer, {"model": "paced", "choices": [], "usage": usage})
        _write_chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")


def _num_tokens(body: dict[str, Any]) -> int:
    if "messages" in body:
        # As a chat template does it: three tokens around each message.
        return sum(len(_text(message).split()) + 3 for message in body["messages"])
    prompt = body["prompt"]
    return len(prompt.split() if isinstance(prompt, str) else prompt)


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _write_event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    _write_chunk(writer, b"data: %s\n\n" % json.dumps(event).encode())


def _write_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _write_json(writer: asyncio.StreamWriter, value: Any, status: str = "200 OK") -> None:
    data = json.dumps(value).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\n\r\n".encode() + data)


async def _serve(pace: _Pace) -> None:
    server = await asyncio.start_server(pace.handle, "127.0.0.1", 0, limit=2**20)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(_Pace(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))))
