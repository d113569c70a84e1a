"""ZeroMQ links between processes: every receiver binds one inbox, every sender connects to it.

All sockets are PUSH/PULL over ipc:// in a private directory. Messages of one sender to one inbox
keep their order, and nothing is dropped. A sender with HIGH_WATER messages in a link to an inbox
waits. The frontend never waits: the bytes in its links are bounded instead (`BoundedOutbox`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from minisrv.errors import DecodeError, OverloadedError
from minisrv.wire.codec import decode, encode
from minisrv.wire.messages import InboxTypes, Message

logger = logging.getLogger("minisrv.wire.sockets")

HIGH_WATER = 1000
INBOX_BYTES = 64 * 2**20
REPORT_BYTES = 2**20


def _endpoint(directory: Path, name: str) -> str:
    path = os.fspath(directory / name)
    if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
        raise ValueError(f"the socket path {path} is too long; set TMPDIR to a shorter directory")
    return f"ipc://{path}"


def _open(context: zmq.Context[Any], kind: int, high_water: int = HIGH_WATER) -> Any:
    """A socket for `high_water` messages per link; 0 means no limit."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, high_water)
    socket.setsockopt(zmq.RCVHWM, high_water)
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

    def drain(self, max_messages: int = sys.maxsize) -> list[Any]:
        """The messages that have arrived, oldest first and of the inbox's types; never blocks."""
        return [message for message, _ in self.drain_frames(max_messages)]

    def drain_frames(self, max_messages: int = sys.maxsize) -> list[tuple[Any, int]]:
        """As `drain`, each message with the bytes of its frame."""
        messages: list[tuple[Any, int]] = []
        while len(messages) < max_messages:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            message = _accept(frame, self._types, self._epoch)
            if message is not None:
                messages.append((message, len(frame)))
        return messages

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


class BoundedOutbox:
    """A PUSH socket to one inbox whose `send` never blocks.

    num_bytes: in frames that the receiver has not reported as taken; it reports each REPORT_BYTES.
    The number of messages has no limit here: those who use it bound that themselves.
    """

    def __init__(
        self, directory: Path, name: str, epoch: int, max_bytes: int = INBOX_BYTES
    ) -> None:
        self._name = name
        self._epoch = epoch
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self._socket = _open(zmq.Context.instance(), zmq.PUSH, high_water=0)
        self._socket.connect(_endpoint(directory, name))

    def send(self, message: Message) -> None:
        """Queue a message. Raises OverloadedError, and sends nothing, when the inbox is full.

        While fewer than REPORT_BYTES wait, a message of any size passes.
        """
        frame = encode(message, self._epoch)
        if self.num_bytes > REPORT_BYTES and self.num_bytes + len(frame) > self._max_bytes:
            raise OverloadedError(
                f"the inbox of {self._name} holds {self.num_bytes} bytes, and this request has "
                f"{len(frame)}; the limit is {self._max_bytes}; try again later",
                reason="inbox",
            )
        self._queue(frame)

    def send_always(self, message: Message) -> None:
        """Queue a message however full the inbox is: one that makes room."""
        self._queue(encode(message, self._epoch))

    def count_taken(self, num_bytes: int) -> None:
        """The receiver has taken frames of this many bytes."""
        self.num_bytes -= num_bytes

    def _queue(self, frame: bytes) -> None:
        self._socket.send(frame, zmq.NOBLOCK)
        self.num_bytes += len(frame)

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
