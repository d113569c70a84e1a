"""The inboxes of processes."""

from pathlib import Path

import pytest

from minisrv.wire.messages import AbortMsg
from minisrv.wire.sockets import Epoch, Inbox, Outbox


def test_an_inbox_is_drained_in_order_and_in_parts(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = Path(tmp_path_factory.mktemp("s"))
    inbox, outbox = Inbox(directory, "in", (AbortMsg,), Epoch(1)), Outbox(directory, "in", Epoch(1))
    sent = [AbortMsg(uids=(i,)) for i in range(10)]
    try:
        for message in sent:
            outbox.send(message)
        received: list[AbortMsg] = []
        while len(received) < len(sent):
            assert inbox.wait(10)
            part = inbox.drain(max_messages=3)
            assert 1 <= len(part) <= 3
            received += part
        assert received == sent
        assert inbox.drain() == []
    finally:
        inbox.close()
        outbox.close()


def test_the_first_frame_of_a_later_epoch_ends_the_earlier_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = Path(tmp_path_factory.mktemp("s"))
    epoch, begun = Epoch(1), list[int]()
    inbox = Inbox(directory, "in", (AbortMsg,), epoch, lambda: begun.append(epoch.number))
    old, new = (Outbox(directory, "in", Epoch(number)) for number in (1, 3))
    try:
        old.send(AbortMsg(uids=(1,)))
        assert inbox.wait(10)
        new.send(AbortMsg(uids=(3,)))
        received: list[AbortMsg] = []
        while not begun:
            assert inbox.wait(10)
            received = inbox.drain()
        assert received == [AbortMsg(uids=(3,))]
        assert begun == [3]
        old.send(AbortMsg(uids=(2,)))
        new.send(AbortMsg(uids=(4,)))
        received = []
        while not received:
            assert inbox.wait(10)
            received = inbox.drain()
        assert received == [AbortMsg(uids=(4,))]
        assert begun == [3]
    finally:
        for socket in (inbox, old, new):
            socket.close()
