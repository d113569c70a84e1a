"""What the record of the scheduler process shows at every moment at which it may die."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from minisrv.engine.forward_batch import ForwardBatch, ForwardOutput
from minisrv.scheduler.channel import LocalChannel
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.supervision.progress import ProgressRecord, ProgressView
from minisrv.wire.messages import AbortMsg, GenerateMsg
from tests.support.builders import generate_msg, make_scheduler
from tests.support.hash_engine import HashEngine

NUM_ROWS = 6


class WatchedEngine(HashEngine):
    """Compares the record with the rows of the steps in flight."""

    def __init__(self, view: ProgressView, *, lazy: bool, **sizes: int) -> None:
        super().__init__(lazy=lazy, vocab_size=50, **sizes)
        self.view = view
        self.loop: SchedulerLoop
        self.in_flight: list[set[int]] = []
        self.most_in_flight = 0

    def launch(self, batch: ForwardBatch) -> Any:
        by_row = {one.lease.row: one.uid for one in self.loop.scheduler.running if one.lease}
        self.in_flight.append({by_row[row] for row in batch.rows.tolist()})
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        self.check()
        return super().launch(batch)

    def wait(self, handle: Any) -> ForwardOutput:
        self.check()
        self.in_flight.pop(0)
        return super().wait(handle)

    def check(self) -> None:
        assert self.view.working_on() == set[int]().union(*self.in_flight)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_record_shows_exactly_the_requests_of_the_steps_in_flight(
    depth: int, tmp_path: Path
) -> None:
    """With few pages and rows: requests are preempted, end, and leave their rows to others."""
    view, record = ProgressView(tmp_path / "p"), ProgressRecord(tmp_path / "p")
    scheduler = make_scheduler(num_pages=24, num_rows=NUM_ROWS, budget=7)
    engine = WatchedEngine(
        view, lazy=depth == 1, num_pages=24, page_size=2, num_rows=NUM_ROWS, max_seq_len=48
    )
    channel = LocalChannel()
    engine.loop = loop = SchedulerLoop(scheduler, engine, channel, depth, progress=record)
    rng = Random(0)
    for uid in range(100, 300, 4):
        prompt = [rng.randrange(50) for _ in range(rng.randint(1, 20))]
        channel.inbox.append(
            generate_msg(uid, prompt, max_tokens=rng.randint(1, 20), n=rng.randint(1, 4))
        )
        if rng.random() < 0.3:
            channel.inbox.append(AbortMsg(uids=(uid - 4,)))
        for _ in range(rng.randint(0, 10)):
            loop.turn()
    while loop.busy:
        loop.turn()
    assert engine.most_in_flight == depth + 1
    assert scheduler.num_preemptions > 0
    assert view.working_on() == set()


def test_the_record_shows_every_choice_of_a_request_that_is_being_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first may have ended before: then only the others show which request it was."""
    view, record = ProgressView(tmp_path / "p"), ProgressRecord(tmp_path / "p")
    scheduler, channel = make_scheduler(), LocalChannel()
    engine: Any = None
    loop = SchedulerLoop(scheduler, engine, channel, 0, progress=record)
    shown: list[set[int]] = []

    def add_request(message: GenerateMsg, now: float) -> None:
        shown.append(view.working_on())

    monkeypatch.setattr(scheduler, "add_request", add_request)
    channel.inbox += [generate_msg(7, [1], n=3), generate_msg(20, [1])]
    loop.turn()
    assert shown == [{7, 8, 9}, {20}]
    assert view.working_on() == set()
