"""The inboxes of processes."""

from pathlib import Path

import pytest

from minisrv.wire.messages import AbortMsg
from minisrv.wire.sockets import Inbox, Outbox


def test_an_inbox_is_drained_in_order_and_in_parts(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = Path(tmp_path_factory.mktemp("s"))
    inbox, outbox = Inbox(directory, "in", (AbortMsg,), 1), Outbox(directory, "in", 1)
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
