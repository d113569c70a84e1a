"""ZeroMQ links between processes: every receiver binds one inbox, every sender connects to it.

All sockets are PUSH/PULL over ipc:// in a private directory. Messages of one sender to one inbox
keep their order. A full inbox (HIGH_WATER messages) makes its senders wait: nothing is dropped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from minisrv.errors import DecodeError
from minisrv.wire.codec import decode, encode
from minisrv.wire.messages import InboxTypes, Message

logger = logging.getLogger("minisrv.wire.sockets")

HIGH_WATER = 100_000


def _endpoint(directory: Path, name: str) -> str:
    path = os.fspath(directory / name)
    if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
        raise ValueError(f"the socket path {path} is too long; set TMPDIR to a shorter directory")
    return f"ipc://{path}"


def _open(context: zmq.Context[Any], kind: int) -> Any:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    return socket


def _accept(frame: bytes, types: InboxTypes, epoch: int) -> Message | None:
    """The message in a frame; None, with a log line, for a frame that must be dropped."""
    try:
        return decode(frame, types, epoch)
    except DecodeError as error:
        logger.error("dropped a frame of %d bytes: %s", len(frame), error)
        return None


class Inbox:
    """A blocking PULL socket that accepts only messages of `types` and of `epoch`."""

    def __init__(self, directory: Path, name: str, types: InboxTypes, epoch: int) -> None:
        self._types = types
        self._epoch = epoch
        self._socket = _open(zmq.Context.instance(), zmq.PULL)
        self._socket.bind(_endpoint(directory, name))

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until a frame is there; False when `timeout_s` has passed without one."""
        return bool(self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)))

    def drain(self) -> list[Any]:
        """All messages that have arrived, oldest first and of the inbox's types; never blocks."""
        messages: list[Any] = []
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            message = _accept(frame, self._types, self._epoch)
            if message is not None:
                messages.append(message)

    def close(self) -> None:
        self._socket.close()


class Outbox:
    """A PUSH socket to one inbox; the inbox may bind later."""

    def __init__(self, directory: Path, name: str, epoch: int) -> None:
        self._epoch = epoch
        self._socket = _open(zmq.Context.instance(), zmq.PUSH)
        self._socket.connect(_endpoint(directory, name))

    def send(self, message: Message) -> None:
        """Queue a message; blocks while the inbox is full."""
        self._socket.send(encode(message, self._epoch))

    def close(self) -> None:
        self._socket.close()


class AsyncInbox:
    def __init__(self, directory: Path, name: str, types: InboxTypes, epoch: int) -> None:
        self._types = types
        self._epoch = epoch
        self._socket = _open(zmq.asyncio.Context.instance(), zmq.PULL)
        self._socket.bind(_endpoint(directory, name))

    async def receive(self) -> Message:
        while True:
            message = _accept(await self._socket.recv(), self._types, self._epoch)
            if message is not None:
                return message

    async def deliver_to(self, handle: Callable[[Any], None]) -> None:
        """Call `handle` with each message, which is of the inbox's types, until cancelled."""
        while True:
            handle(await self.receive())

    def close(self) -> None:
        self._socket.close()
