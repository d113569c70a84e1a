"""How the loop receives requests and sends tokens: over ZeroMQ, or inside one process."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Protocol

from minisrv.wire.messages import (
    SCHEDULER_INBOX,
    AbortMsg,
    AnswerMsg,
    DetokenizeMsg,
    FlushMsg,
    GenerateMsg,
    Message,
    StatsMsg,
)
from minisrv.wire.sockets import Inbox, Outbox


class Channel(Protocol):
    def receive(self, wait: bool) -> list[Message]:
        """All messages that have arrived, oldest first; with `wait`, block until there is one.

        May return nothing after a while of waiting, so that the caller can look whether to stop.
        """

    def send(self, message: DetokenizeMsg) -> None:
        """Send the tokens of a step to the detokenizer."""

    def send_to_frontend(self, message: AnswerMsg | StatsMsg) -> None:
        """Send the answer to a query, or statistics, to the frontend."""


class ZmqChannel:
    """The scheduler process: inbox `scheduler`, outboxes `detokenizer` and `frontend`."""

    WAIT_S = 1.0

    def __init__(self, run_dir: Path, epoch: int) -> None:
        self._inbox = Inbox(run_dir, "scheduler", SCHEDULER_INBOX, epoch)
        self._outbox = Outbox(run_dir, "detokenizer", epoch)
        self._frontend = Outbox(run_dir, "frontend", epoch)

    def receive(self, wait: bool) -> list[Message]:
        if wait:
            self._inbox.wait(self.WAIT_S)
        return self._inbox.drain()

    def send(self, message: DetokenizeMsg) -> None:
        self._outbox.send(message)

    def send_to_frontend(self, message: AnswerMsg | StatsMsg) -> None:
        self._frontend.send(message)

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()
        self._frontend.close()


class LocalChannel:
    """Messages by hand, for the offline engine and tests: put into `inbox`, take from `outbox`.

    `sent_to_frontend` keeps the last messages to the frontend.
    """

    def __init__(self) -> None:
        self.inbox: deque[GenerateMsg | AbortMsg | FlushMsg] = deque()
        self.outbox: deque[DetokenizeMsg] = deque()
        self.sent_to_frontend: deque[AnswerMsg | StatsMsg] = deque(maxlen=8)

    def receive(self, wait: bool) -> list[Message]:
        """See Channel; never blocks, since nobody else could put a message in."""
        messages: list[Message] = list(self.inbox)
        self.inbox.clear()
        return messages

    def send(self, message: DetokenizeMsg) -> None:
        self.outbox.append(message)

    def send_to_frontend(self, message: AnswerMsg | StatsMsg) -> None:
        self.sent_to_frontend.append(message)
