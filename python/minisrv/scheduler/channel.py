"""How the loop receives requests and sends tokens; here inside one process."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    DetokenizeMsg,
    FlushMsg,
    GenerateMsg,
    Message,
    ShowTreeMsg,
    StatsMsg,
)


class Channel(Protocol):
    """The two ends of the loop. `ZmqChannel` is that of the scheduler process."""

    def receive(self, wait: bool) -> list[Message]:
        """All messages that have arrived, oldest first; with `wait`, may block until there is one.

        Returns an empty list from time to time, so that the caller can check whether to stop.
        """

    def begins_epoch(self) -> bool:
        """Whether the messages last received are the first of a new epoch.

        Then nobody waits for the replies to earlier ones.
        """

    def send(self, message: DetokenizeMsg) -> None:
        """Send the tokens of a step to the detokenizer."""

    def send_to_frontend(self, message: AnswerMsg | StatsMsg) -> None:
        """Send the answer to a query, or the figures of the last half second."""


class LocalChannel:
    """The Channel of an offline engine: the caller fills `inbox` and empties `outbox`."""

    def __init__(self) -> None:
        self.inbox: deque[GenerateMsg | AbortMsg | FlushMsg | ShowTreeMsg] = deque()
        self.outbox: deque[DetokenizeMsg] = deque()
        self.sent_to_frontend: deque[AnswerMsg | StatsMsg] = deque(maxlen=8)

    def receive(self, wait: bool) -> list[Message]:
        """All messages in the inbox; never blocks."""
        messages: list[Message] = list(self.inbox)
        self.inbox.clear()
        return messages

    def begins_epoch(self) -> bool:
        """Never: requests end with the process."""
        return False

    def send(self, message: DetokenizeMsg) -> None:
        self.outbox.append(message)

    def send_to_frontend(self, message: AnswerMsg | StatsMsg) -> None:
        self.sent_to_frontend.append(message)
