"""Requests of many choices are read in groups, and each figure counts once."""

from __future__ import annotations

import asyncio

from minisrv.frontend.generation.event_reader import Usage
from minisrv.frontend.generation.groups import CHOICES_AT_ONCE, in_groups
from minisrv.wire.events import Event
from minisrv.wire.messages import Start


def test_others_run_between_two_groups() -> None:
    order: list[str | int] = []

    async def other() -> None:
        while len(order) < 8:
            order.append("other")
            await asyncio.sleep(0)

    async def main() -> None:
        running = asyncio.create_task(other())
        async for group in in_groups(iter(range(2 * CHOICES_AT_ONCE + 3))):
            order.append(len(group))
        await running

    asyncio.run(main())
    assert order[:5] == [CHOICES_AT_ONCE, "other", CHOICES_AT_ONCE, "other", 3]


def test_no_items_are_no_group() -> None:
    async def count() -> int:
        return len([group async for group in in_groups(())])

    assert asyncio.run(count()) == 0


def test_an_event_that_is_counted_again_adds_nothing() -> None:
    usage = Usage(choices_per_prompt=2)
    start = Start(
        uid=1,
        prompt_tokens=7,
        cached_tokens=3,
        min_tokens=0,
        stop=(),
        skip_special_tokens=True,
    )
    for index, tokens in ((0, 4), (0, 4), (1, 5), (0, 6), (2, 1), (2, 1)):
        event = Event(index + 1, index, start=start, output_tokens=tokens, reasoning_tokens=tokens)
        event.deltas.append("a")
        usage.count(event)
    assert (usage.prompt_tokens, usage.cached_tokens) == (14, 6)
    assert usage.output_tokens == usage.reasoning_tokens == 6 + 5 + 1
