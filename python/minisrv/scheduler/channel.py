"""How the loop receives requests and sends tokens: over ZeroMQ, or inside one process."""

from __future__ import annotations

from collections import deque
from pathlib import Path

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


class ZmqChannel:
    """The sockets of the scheduler process."""

    WAIT_S = 1.0

    def __init__(self, run_dir: Path, epoch: int) -> None:
        self._inbox = Inbox(run_dir, "scheduler", SCHEDULER_INBOX, epoch)
        self._outbox = Outbox(run_dir, "detokenizer", epoch)
        self._frontend = Outbox(run_dir, "frontend", epoch)

    def receive(self, wait: bool) -> list[Message]:
        """All messages that have arrived, oldest first; with `wait`, block until there is one.

        Returns an empty list after WAIT_S, so that the caller can check whether to stop.
        """
        if wait:
            self._inbox.wait(self.WAIT_S)
        return self._inbox.drain()

    def send(self, message: DetokenizeMsg) -> None:
        """Send the tokens of a step to the detokenizer."""
        self._outbox.send(message)

    def send_to_frontend(self, message: AnswerMsg | StatsMsg) -> None:
        self._frontend.send(message)

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()
        self._frontend.close()


class LocalChannel:
    """The same for an offline engine: the caller fills `inbox` and empties `outbox`."""

    def __init__(self) -> None:
        self.inbox: deque[GenerateMsg | AbortMsg | FlushMsg] = deque()
        self.outbox: deque[DetokenizeMsg] = deque()
        self.sent_to_frontend: deque[AnswerMsg | StatsMsg] = deque(maxlen=8)

    def receive(self, wait: bool) -> list[Message]:
        """All messages in the inbox; never blocks."""
        messages: list[Message] = list(self.inbox)
        self.inbox.clear()
        return messages

    def send(self, message: DetokenizeMsg) -> None:
        self.outbox.append(message)

    def send_to_frontend(self, message: AnswerMsg | StatsMsg) -> None:
        self.sent_to_frontend.append(message)
