"""ZeroMQ links between processes: every receiver binds one inbox, every sender connects to it.

All sockets are PUSH/PULL over ipc:// in a private directory. Messages of one sender to one inbox
keep their order, and nothing of the same epoch is dropped. A sender with HIGH_WATER messages in a
link to an inbox waits. The frontend never waits: the bytes in its links are bounded instead
(`BoundedOutbox`).

A new epoch begins when a process has been started again. The links outlive the process, and what
was sent to the earlier one reaches the new one: every frame names its epoch, and an inbox drops
those of earlier ones. Processes that keep running learn from the first frame of a new epoch that
nobody waits for what they are working on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from minisrv.errors import DecodeError, OtherEpochError, OverloadedError
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


class Epoch:
    """The number of the epoch that a process is in, shared by its sockets."""

    def __init__(self, number: int) -> None:
        self.number = number


def _accept(frame: bytes, types: InboxTypes, epoch: Epoch) -> Message | None:
    """The message in a frame; None for a frame that must be dropped.

    It is logged, unless it is of an earlier epoch. Raises OtherEpochError for a later one.
    """
    try:
        return decode(frame, types, epoch.number)
    except OtherEpochError as error:
        if error.epoch > epoch.number:
            raise
        logger.debug("dropped a frame of %d bytes: %s", len(frame), error)
    except DecodeError as error:
        logger.error("dropped a frame of %d bytes: %s", len(frame), error)
    return None


class Inbox:
    """A blocking PULL socket that accepts only messages of `types`.

    A message of a later epoch begins that epoch for the process: `epoch` changes, `on_new_epoch` is
    called, and messages of the earlier one that were not returned yet are dropped.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        types: InboxTypes,
        epoch: Epoch,
        on_new_epoch: Callable[[], None] = lambda: None,
    ) -> None:
        self._types = types
        self._epoch = epoch
        self._on_new_epoch = on_new_epoch
        self._socket = _open(zmq.Context.instance(), zmq.PULL)
        self._socket.bind(_endpoint(directory, name))

    def wait(self, timeout_s: float | None = None, beside: Any = None) -> bool:
        """Block until a frame is there, or one at the socket `beside`.

        Returns False when `timeout_s` has passed without one.
        """
        poller = zmq.Poller()
        for socket in filter(None, (self._socket, beside)):
            poller.register(socket, zmq.POLLIN)
        return bool(poller.poll(None if timeout_s is None else int(timeout_s * 1000)))

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
            try:
                message = _accept(frame, self._types, self._epoch)
            except OtherEpochError as later:
                messages.clear()
                self._epoch.number = later.epoch
                self._on_new_epoch()
                message = _accept(frame, self._types, self._epoch)
            if message is not None:
                messages.append((message, len(frame)))
        return messages

    def close(self) -> None:
        self._socket.close()


class Outbox:
    """A PUSH socket to one inbox; the inbox may bind later."""

    def __init__(self, directory: Path, name: str, epoch: Epoch) -> None:
        self._epoch = epoch
        self._socket = _open(zmq.Context.instance(), zmq.PUSH)
        self._socket.connect(_endpoint(directory, name))

    def send(self, message: Message) -> None:
        """Queue a message; blocks while the inbox is full."""
        self._socket.send(encode(message, self._epoch.number))

    def has_room(self) -> bool:
        """Whether `send` would not block."""
        return bool(self._socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT)

    def close(self) -> None:
        self._socket.close()


class BoundedOutbox:
    """A PUSH socket to one inbox whose `send` never blocks.

    num_bytes: in frames that the receiver has not reported as taken; it reports each REPORT_BYTES.
    The number of messages has no limit here: those who use it bound that themselves.
    """

    def __init__(
        self, directory: Path, name: str, epoch: Epoch, max_bytes: int = INBOX_BYTES
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
        frame = encode(message, self._epoch.number)
        if self.num_bytes > REPORT_BYTES and self.num_bytes + len(frame) > self._max_bytes:
            raise OverloadedError(
                f"the inbox of {self._name} holds {self.num_bytes} bytes, and this request has "
                f"{len(frame)}; the limit is {self._max_bytes}; try again later",
                reason="inbox",
            )
        self._queue(frame)

    def send_always(self, message: Message) -> None:
        """Queue a message however full the inbox is: one that makes room."""
        self._queue(encode(message, self._epoch.number))

    def count_taken(self, num_bytes: int) -> None:
        """The receiver has taken frames of this many bytes."""
        self.num_bytes -= num_bytes

    def _queue(self, frame: bytes | memoryview) -> None:
        self._socket.send(frame, zmq.NOBLOCK)
        self.num_bytes += len(frame)

    def close(self) -> None:
        self._socket.close()


class AsyncInbox:
    """As `Inbox`, in an event loop. It drops messages of other epochs, later ones too."""

    def __init__(self, directory: Path, name: str, types: InboxTypes, epoch: Epoch) -> None:
        self._types = types
        self._epoch = epoch
        self._socket = _open(zmq.asyncio.Context.instance(), zmq.PULL)
        self._socket.bind(_endpoint(directory, name))

    async def receive(self) -> Message:
        while True:
            frame = await self._socket.recv()
            with contextlib.suppress(OtherEpochError):
                message = _accept(frame, self._types, self._epoch)
                if message is not None:
                    return message

    async def deliver_to(self, handle: Callable[[Any], None]) -> None:
        """Call `handle` with each message, which is of the inbox's types, until cancelled."""
        while True:
            handle(await self.receive())

    def close(self) -> None:
        self._socket.close()
