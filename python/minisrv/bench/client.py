"""A client of one server: sends requests, and reports what happened to each."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from minisrv.bench.connection import ConnectionPool, RequestError
from minisrv.bench.reply import Failure, Reply, error_text
from minisrv.errors import MinisrvError
from minisrv.option_values import authorization

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
INTERRUPTED = Failure("interrupted")


class BenchError(MinisrvError):
    """The server cannot be measured."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What requests ask for beside their prompt. fields: further fields of the API."""

    temperature: float = 0.0
    ignore_eos: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What happened to one request. Times are in the seconds of time.perf_counter.

    planned_s: when it should have been sent. chunk_s: when each chunk with output arrived.
    end_s: when its reply ended, or it failed. wanted_tokens: the output asked for.
    The counts of tokens are the server's usage; None if it has sent none.
    """

    planned_s: float
    sent_s: float
    wanted_tokens: int
    end_s: float = 0.0
    chunk_s: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    failure: Failure | None = None


class Client:
    """url: of the server, with or without a last /v1. model: as requests name it."""

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        api_key: str = "",
        endpoint: str = "completions",
        sampling: Sampling | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Raises ConfigError for a URL or key that cannot be used."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.endpoint = endpoint
        self.sampling = sampling or Sampling()
        self._timeout_s = timeout_s
        self._pool = ConnectionPool(self.url)
        self._path = urlsplit(self.url).path
        head = f"Host: {self._pool.host}\r\nUser-Agent: minisrv-bench\r\nAccept: */*\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in authorization(api_key).items())
        self._head = head

    async def generate(
        self,
        prompt: str,
        max_tokens: int,
        planned_s: float | None = None,
        keep_output: bool = False,
    ) -> tuple[Outcome, Reply]:
        """Send one request and read its stream to the end; a failure is in the outcome.

        prompt: the JSON of the field `prompt` or, for chat, of `messages`.
        If the task is cancelled, the outcome's failure is INTERRUPTED.
        """
        body = self._body(prompt, max_tokens, keep_output)
        request = self._request("POST", ENDPOINTS[self.endpoint], body)
        reply = Reply(keep_output)
        sent = time.perf_counter()
        outcome = Outcome(sent if planned_s is None else planned_s, sent, max_tokens)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.send(request, reply)
            outcome.failure = reply.end()
        except RequestError as error:
            outcome.failure = reply.failure or (None if reply.done else error.failure)
        except TimeoutError:
            outcome.failure = Failure("timeout", f"no end after {self._timeout_s:g} s")
        except asyncio.CancelledError:
            outcome.failure = INTERRUPTED
        outcome.end_s = time.perf_counter()
        outcome.chunk_s = reply.chunk_times
        _read_usage(outcome, reply.usage)
        return outcome, reply

    async def get(self, path: str) -> Any:
        """The JSON of another route. Raises BenchError."""
        body = _Body()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.send(self._request("GET", path, b""), body)
        except (RequestError, TimeoutError) as error:
            raise BenchError(f"no server answers at {self.url}: {error}") from None
        try:
            value = json.loads(body.data)
        except (ValueError, RecursionError):
            value = None
        if body.status != 200 or value is None:
            said = f": {error_text(value)}" if isinstance(value, dict) else ""
            raise BenchError(f"{self.url}{path} answers with status {body.status}{said}")
        return value

    async def first_model(self) -> str:
        """The first model of /v1/models. Raises BenchError."""
        try:
            return str((await self.get("/v1/models"))["data"][0]["id"])
        except (LookupError, TypeError):
            raise BenchError(f"{self.url}/v1/models names no model; give one: --model") from None

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._pool.close()

    def _body(self, prompt: str, max_tokens: int, keep_output: bool) -> bytes:
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": self.sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.sampling.ignore_eos:
            fields["ignore_eos"] = True
        name = "messages" if self.endpoint == "chat" else "prompt"
        if keep_output and name == "prompt" and prompt.startswith("["):
            fields["return_token_ids"] = True
        head = json.dumps({**fields, **self.sampling.fields})
        return f'{head[:-1]}, "{name}": {prompt}}}'.encode()

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body


class _Body:
    """Keeps a whole response."""

    def __init__(self) -> None:
        self.status = 0
        self.data = b""

    def begin(self, status: int) -> None:
        self.status = status

    def feed(self, data: bytes, now: float) -> None:
        self.data += data


def _read_usage(outcome: Outcome, usage: Mapping[str, Any]) -> None:
    outcome.prompt_tokens = usage.get("prompt_tokens")
    outcome.output_tokens = usage.get("completion_tokens")
    outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
