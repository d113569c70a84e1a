"""The sockets of the scheduler process."""

from __future__ import annotations

from pathlib import Path

from minisrv.supervision.child_main import BEAT_S
from minisrv.supervision.records import NewEpoch, Notice
from minisrv.wire.messages import SCHEDULER_INBOX, AnswerMsg, DetokenizeMsg, Message, StatsMsg
from minisrv.wire.sockets import Epoch, Inbox, Outbox


class ZmqChannel:
    """A Channel between processes, over ZeroMQ."""

    # A request of thousands of prompts arrives faster than it is read; steps must go on meanwhile.
    # To read and to start one prompt takes 0.4 ms on a slow processor.
    MAX_MESSAGES = 16

    def __init__(self, run_dir: Path, epoch: int) -> None:
        self._epoch = Epoch(epoch)
        self._announced = epoch
        self._begins_epoch = False
        self._inbox = Inbox(
            run_dir, "scheduler", SCHEDULER_INBOX, self._epoch, self._note_new_epoch
        )
        self._outbox = Outbox(run_dir, "detokenizer", self._epoch)
        self._frontend = Outbox(run_dir, "frontend", self._epoch)
        self.kv_events = Outbox(run_dir, "kv_events", self._epoch)

    def take_notice(self, notice: Notice) -> None:
        """Enter a new epoch of which no message may come soon. May be called in any thread."""
        if isinstance(notice, NewEpoch):
            self._announced = notice.epoch

    def receive(self, wait: bool) -> list[Message]:
        """With `wait`, blocks for at most BEAT_S. The rest is returned by later calls."""
        if wait:
            self._inbox.wait(BEAT_S)
        if self._announced > self._epoch.number:
            self._epoch.number = self._announced
            self._note_new_epoch()
        return self._inbox.drain(self.MAX_MESSAGES)

    def begins_epoch(self) -> bool:
        begins, self._begins_epoch = self._begins_epoch, False
        return begins

    def _note_new_epoch(self) -> None:
        self._begins_epoch = True

    def send(self, message: DetokenizeMsg) -> None:
        self._outbox.send(message)

    def send_to_frontend(self, message: AnswerMsg | StatsMsg) -> None:
        self._frontend.send(message)

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()
        self._frontend.close()
        self.kv_events.close()
