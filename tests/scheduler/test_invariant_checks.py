"""MINISRV_CHECK=1 has the loop assert the invariants in every turn."""

from __future__ import annotations

import pytest

from minisrv.scheduler.loop import CHECK_VARIABLE, SchedulerLoop
from tests.support.builders import generate_msg, hash_loop


def loop_with_a_lost_page() -> SchedulerLoop:
    loop = hash_loop()
    loop.channel.inbox.append(generate_msg(0, [1, 2, 3], max_tokens=8))
    loop.turn()
    loop.scheduler.cache.pages.allocate(1)
    return loop


def test_a_lost_page_is_found_in_the_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECK_VARIABLE, "1")
    loop = loop_with_a_lost_page()
    with pytest.raises(AssertionError, match="pages lost"):
        loop.turn()


@pytest.mark.parametrize("value", ["", "0"])
def test_without_it_nothing_is_checked(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECK_VARIABLE, value)
    loop = loop_with_a_lost_page()
    while loop.busy:
        loop.turn()
