"""The order of the notices about an engine's state."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from minisrv.config import ServerConfig
from minisrv.errors import EngineDeadError
from minisrv.supervision.records import ChildReady, EngineLost, EngineReady, Notice
from minisrv.supervision.supervisor import Supervisor


def child_of(kind: str) -> Any:
    """A child that serves, as the supervisor sees it."""
    return SimpleNamespace(
        kind=kind,
        index=0,
        name=kind,
        ready=ChildReady(),
        progress=SimpleNamespace(last_beat=time.monotonic(), working_on=set),
        watched_fds=(),
        killed_because=None,
        error=lambda: EngineDeadError(f"the {kind} process has died"),
        kill=lambda: None,
        send_signal=lambda number: None,
    )


def test_a_death_right_after_a_stall_is_the_last_notice_until_the_engine_is_whole() -> None:
    """A late EngineReady would have the frontend send all requests to processes that have them."""
    notices: list[Notice] = []
    supervisor = Supervisor(ServerConfig(), on_notice=notices.append)
    stalled, dies = child_of("scheduler"), child_of("tokenizer")
    supervisor._children += [stalled, dies]
    supervisor._announce()
    supervisor._report_ready()
    supervisor._judge(stalled, time.monotonic())  # it goes on
    supervisor._lose(dies)
    supervisor._restart_due()
    assert [type(notice) for notice in notices] == [EngineReady, EngineLost]
    supervisor._exit_stack.close()


def test_a_stalled_process_is_judged_anew_if_another_dies_meanwhile() -> None:
    supervisor = Supervisor(ServerConfig())
    stalled, dies = child_of("scheduler"), child_of("tokenizer")
    supervisor._children += [stalled, dies]
    supervisor._announce()
    supervisor._ask_for_stacks(stalled, 30.0, time.monotonic())
    assert stalled.killed_because
    supervisor._lose(dies)
    assert stalled.killed_because is None, "its own death may have another reason"
    supervisor._exit_stack.close()
