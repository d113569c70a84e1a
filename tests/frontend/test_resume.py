"""The registry over the death of a process: what is open is sent again, from where it stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minisrv.errors import MinisrvError, NotReadyError, OverloadedError, RequestFailedError
from minisrv.frontend.registry.open_request import CLEARING_TOKENS, PROVEN_TOKENS
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.frontend.registry.states import Draining, Restarting, Serving
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    DescribeMsg,
    Finish,
    TokenizeMsg,
    UserReply,
)
from tests.frontend.test_request_registry import Sent, make_message, make_registry
from tests.support.http_server import MODEL
from tests.support.scripted_backend import reply, start_of

DEATH = "the scheduler process has died"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def tokens(uid: int, ids: list[int], finish: Finish = Finish.NONE) -> UserReply:
    return replace(
        reply(uid, "x" * len(ids), len(ids), finish),
        new_ids=np.array(ids, np.int32),
        num_new_ids=np.array([len(ids)], np.int32),
    )


async def die_and_resume(registry: RequestRegistry, suspects: tuple[int, ...] = ()) -> None:
    registry.hold(DEATH)
    registry.resume(MODEL, suspects)
    await run_others()


async def run_others() -> None:
    """Let all tasks go on until they wait for a time or for a message."""
    for _ in range(300):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)
    await run_others()


def resumed(message: Any) -> dict[int, list[int]]:
    assert isinstance(message, TokenizeMsg)
    return {one.uid: one.token_ids.tolist() for one in message.resumed}


def sent_now(sent: Sent) -> list[TokenizeMsg]:
    messages = [message for _, message in sent if isinstance(message, TokenizeMsg)]
    sent.clear()
    return messages


def test_each_request_is_sent_again_with_the_output_that_has_arrived() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        new, begun, several = registry.open(), registry.open(), registry.open(3)
        for uid, n in ((new, 1), (begun, 1), (several, 3)):
            registry.send(make_message(uid, n))
        registry.deliver(replace(tokens(begun, [5, 6]), starts=(start_of(begun),)))
        await registry.next_events(begun)
        registry.deliver(tokens(begun, [7]))  # nobody has read this one
        registry.deliver(tokens(several, [8]))
        registry.deliver(tokens(several + 1, [9], Finish.STOP))
        first = sent_now(sent)
        await die_and_resume(registry)
        again = sent_now(sent)
        assert [message.uid for message in again] == [new, begun, several]
        assert [resumed(message) for message in again] == [
            {},
            {begun: [5, 6, 7]},
            {several: [8], several + 2: []},
        ]
        # A request that has no seed of its own keeps the one that it was given.
        assert [m.sampling for m in again] == [m.sampling for m in first]
        assert len({m.sampling.seed for m in again}) == 3
        assert [m.sent_at for m in again] == [m.sent_at for m in first]
        registry.deliver(tokens(begun, [10]))
        await die_and_resume(registry)
        assert resumed(sent_now(sent)[1]) == {begun: [5, 6, 7, 10]}
        assert registry.num_resumed == 6

    run(check())


def test_what_arrives_meanwhile_is_sent_then_and_not_before() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        registry.hold(DEATH)
        assert registry.state == Restarting(MODEL, DEATH)
        base = registry.open()
        registry.send(make_message(base))
        query = asyncio.create_task(registry.ask(lambda number: DescribeMsg(query=number)))
        await asyncio.sleep(0)
        assert sent == []
        registry.resume(MODEL)
        assert registry.state == Serving(MODEL)
        await run_others()
        kinds = [type(message) for _, message in sent]
        assert sorted(kinds, key=str) == [DescribeMsg, TokenizeMsg]
        registry.receive(AnswerMsg(query=base + 1, value={"a": 1}))
        assert await query == {"a": 1}

    run(check())


def test_an_open_query_is_sent_again_unless_its_caller_has_gone() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        asked = [
            asyncio.create_task(registry.ask(lambda number: DescribeMsg(query=number)))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        asked[0].cancel()
        await asyncio.sleep(0)
        sent.clear()
        await die_and_resume(registry)
        assert [message for _, message in sent] == [DescribeMsg(query=2)]
        assert registry.num_open == 1
        registry.receive(AnswerMsg(query=2, value={}))
        await asked[1]

    run(check())


def test_aborted_requests_are_not_sent_again_and_their_places_are_free() -> None:
    async def check() -> None:
        registry, sent = make_registry(max_open_requests=3)
        before, meanwhile, afterwards = (registry.open() for _ in range(3))
        for uid in (before, meanwhile, afterwards):
            registry.send(make_message(uid))
        registry.abort(before)
        registry.hold(DEATH)
        registry.abort(meanwhile)
        sent.clear()
        registry.resume(MODEL)
        registry.abort(afterwards)  # it is not sent yet
        await run_others()
        assert not [message for _, message in sent if not isinstance(message, AbortMsg)]
        assert registry.num_open == 0

    run(check())


def test_an_abort_after_the_resume_goes_to_the_tokenizer_that_has_the_request() -> None:
    async def check() -> None:
        registry, sent = make_registry(num_tokenizers=3)
        base = registry.open()
        registry.send(make_message(base))
        await die_and_resume(registry)
        (_, (index, _)) = sent
        registry.abort(base)
        assert sent[-1] == (index, AbortMsg(uids=(base,)))

    run(check())


def test_a_further_death_during_the_resume_begins_it_anew() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        uids = [registry.open() for _ in range(100)]
        for uid in uids:
            registry.send(make_message(uid))
        sent.clear()
        registry.hold(DEATH)
        registry.resume(MODEL)
        await asyncio.sleep(0)
        registry.hold(DEATH)
        sent.clear()
        await run_others()
        assert sent == []
        registry.resume(MODEL)
        await run_others()
        assert [message.uid for message in sent_now(sent)] == uids

    run(check())


def test_a_request_that_is_still_being_sent_is_sent_once() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        base = registry.open(6)

        async def send_all() -> None:
            for uid in range(base, base + 6):
                registry.send(make_message(uid))
                await asyncio.sleep(0)

        sending = asyncio.create_task(send_all())
        await asyncio.sleep(0)
        registry.hold(DEATH)
        await asyncio.sleep(0)
        sent.clear()
        registry.resume(MODEL)
        await run_others()
        assert sending.done()
        assert sorted(message.uid for message in sent_now(sent)) == [*range(base, base + 6)]

    run(check())


def test_a_full_inbox_delays_the_resume_and_loses_nothing() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        uids = [registry.open() for _ in range(5)]
        for uid in uids:
            registry.send(make_message(uid))
        received: list[int] = []

        def send(index: int, message: Any) -> None:
            if len(received) % 2 and not sent:
                sent.append((index, message))
                raise OverloadedError("full", reason="inbox")
            sent.clear()
            received.append(message.uid)

        registry.connect(send)
        await die_and_resume(registry)
        await until(lambda: len(received) >= len(uids))
        assert received == uids

    run(check())


def test_a_request_that_was_worked_on_at_two_deaths_is_given_up() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        poison, other = registry.open(), registry.open()
        for uid in (poison, other):
            registry.send(make_message(uid))
        sent.clear()
        await die_and_resume(registry, (poison, 12345))
        assert [message.uid for message in sent_now(sent)] == [poison]  # first it has to go on
        await die_and_resume(registry, (poison,))
        (event,) = await registry.next_events(poison)
        with pytest.raises(RequestFailedError) as caught:
            event.raise_failure()
        assert (caught.value.code, caught.value.http_status) == ("request_ended_engine", 500)
        assert not registry.is_open(poison)
        assert registry.is_open(other)
        assert registry.given_up == {"suspect": 1}
        assert [message.uid for message in sent_now(sent)] == [other]

    run(check())


def test_suspects_are_sent_when_those_before_have_gone_on() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        uids = [registry.open() for _ in range(4)]
        for uid in uids:
            registry.send(make_message(uid))
        sent.clear()
        await die_and_resume(registry, tuple(uids[1:]))
        assert [message.uid for message in sent_now(sent)] == [uids[1]]
        registry.deliver(replace(tokens(uids[1], [1] * (PROVEN_TOKENS - 1)), starts=()))
        await asyncio.sleep(0.02)
        assert sent == []
        registry.deliver(tokens(uids[1], [1]))
        await until(lambda: sent)
        assert [message.uid for message in sent_now(sent)] == [uids[2]]
        registry.abort(uids[2])
        await until(lambda: any(isinstance(message, TokenizeMsg) for _, message in sent))
        assert [message.uid for message in sent_now(sent)] == [uids[3]]
        registry.deliver(reply(uids[3], "", 0, Finish.STOP))
        await until(lambda: sent)
        assert [message.uid for message in sent_now(sent)] == [uids[0]]

    run(check())


@pytest.mark.parametrize("client", ["stays", "leaves first", "leaves on hold"])
def test_one_that_has_gone_on_is_not_given_up_for_one_that_has_not(client: str) -> None:
    async def check() -> None:
        registry, sent = make_registry()
        good, poison = registry.open(), registry.open()
        for uid in (good, poison):
            registry.send(make_message(uid))
        sent.clear()
        await die_and_resume(registry, (good, poison))
        registry.deliver(tokens(good, [1] * PROVEN_TOKENS))
        await until(lambda: len(sent) == 2)
        if client == "leaves first":
            registry.abort(poison)
        registry.hold(DEATH)
        if client == "leaves on hold":
            registry.abort(poison)
        registry.resume(MODEL, (good, poison))
        await run_others()
        assert registry.given_up == {"suspect": 1}
        assert (registry.is_open(good), registry.num_open) == (True, 1)

    run(check())


@pytest.mark.parametrize("progress", [CLEARING_TOKENS - 1, CLEARING_TOKENS])
def test_progress_clears_a_suspect(progress: int) -> None:
    async def check() -> None:
        registry, _ = make_registry()
        base = registry.open()
        registry.send(make_message(base))
        registry.deliver(replace(tokens(base, [1] * 10), starts=(start_of(base),)))
        await die_and_resume(registry, (base,))
        registry.deliver(tokens(base, [2] * progress))
        await die_and_resume(registry, (base,))
        assert (registry.given_up.total() == 0) == (progress >= CLEARING_TOKENS)

    run(check())


@pytest.mark.parametrize("leaves_first", [True, False])
def test_what_nobody_waits_for_is_forgotten_although_no_process_can_end_it(
    leaves_first: bool,
) -> None:
    async def check() -> None:
        registry, sent = make_registry()
        base = registry.open(2)
        registry.send(make_message(base, 2))
        query = asyncio.create_task(registry.ask(lambda number: DescribeMsg(query=number)))
        await run_others()

        async def leave() -> None:
            registry.abort(base)
            query.cancel()
            await run_others()

        if leaves_first:
            await leave()
            assert registry.num_open == 3  # until the other processes confirm the end
            registry.hold(DEATH)
        else:
            registry.hold(DEATH)
            sent.clear()
            await leave()
            assert not sent
        assert registry.num_open == 0
        assert registry.is_idle
        sent.clear()
        registry.resume(MODEL, (base,))
        await run_others()
        assert not sent
        assert registry.num_resumed == 0

    run(check())


def test_without_resuming_all_that_is_open_fails() -> None:
    async def check() -> None:
        registry, _ = make_registry(resume=False)
        base = registry.open(2)
        registry.send(make_message(base, 2))
        query = asyncio.create_task(registry.ask(lambda number: DescribeMsg(query=number)))
        await asyncio.sleep(0)
        registry.hold(DEATH)
        with pytest.raises(NotReadyError, match=DEATH) as caught:
            await query
        assert caught.value.code == "engine_restarted"
        for event in await registry.next_events(base):
            with pytest.raises(MinisrvError, match=DEATH):
                event.raise_failure()
        assert registry.given_up == {"no_resume": 2}
        assert registry.num_open == 0

    run(check())


def test_a_drain_that_began_before_or_meanwhile_goes_on() -> None:
    async def check() -> None:
        for drains_first in (True, False):
            registry, sent = make_registry()
            base = registry.open()
            registry.send(make_message(base))
            if drains_first:
                registry.start_drain()
            registry.hold(DEATH)
            registry.start_drain()
            assert registry.state == Draining(MODEL)
            registry.resume(MODEL)
            assert registry.state == Draining(MODEL)
            await run_others()
            assert [message.uid for message in sent_now(sent)] == [base, base]

    run(check())
