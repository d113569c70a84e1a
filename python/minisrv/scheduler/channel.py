"""How the loop gets requests and tells of tokens: over ZeroMQ, or inside one process."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Protocol

from minisrv.ipc import Inbox, Outbox
from minisrv.messages import SCHEDULER_INBOX, AbortMsg, DetokenizeMsg, GenerateMsg, Message


class Channel(Protocol):
    """The loop's side of the link."""

    def receive(self, wait: bool) -> list[Message]:
        """All messages that have come, oldest first; with `wait`, block until there is one.

        May return nothing after a while of waiting, so that the caller can look whether to stop.
        """

    def send(self, message: DetokenizeMsg) -> None:
        """Pass on what came of a step."""


class ZmqChannel:
    """The scheduler process: inbox `scheduler`, outbox `detokenizer`."""

    WAIT_S = 1.0

    def __init__(self, run_dir: Path, epoch: int) -> None:
        self.epoch = epoch
        self._inbox = Inbox(run_dir, "scheduler", SCHEDULER_INBOX, epoch)
        self._outbox = Outbox(run_dir, "detokenizer")

    def receive(self, wait: bool) -> list[Message]:
        """See Channel."""
        if wait:
            self._inbox.wait(self.WAIT_S)
        return self._inbox.drain()

    def send(self, message: DetokenizeMsg) -> None:
        """See Channel."""
        self._outbox.send(message)

    def close(self) -> None:
        """Close both sockets."""
        self._inbox.close()
        self._outbox.close()


class LocalChannel:
    """Messages by hand, for the offline engine and tests: put into `inbox`, take from `outbox`."""

    epoch = 0

    def __init__(self) -> None:
        self.inbox: deque[GenerateMsg | AbortMsg] = deque()
        self.outbox: deque[DetokenizeMsg] = deque()

    def receive(self, wait: bool) -> list[Message]:
        """See Channel; never blocks, since nobody else could put a message in."""
        messages: list[Message] = list(self.inbox)
        self.inbox.clear()
        return messages

    def send(self, message: DetokenizeMsg) -> None:
        """See Channel."""
        self.outbox.append(message)
