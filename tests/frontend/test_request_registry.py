"""The registry keeps its promise: each uid one final, in every order of events."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minisrv.config import ServerConfig
from minisrv.errors import (
    EngineDeadError,
    MinisrvError,
    NotReadyError,
    OverloadedError,
    RequestFailedError,
)
from minisrv.frontend.registry import queries
from minisrv.frontend.registry.open_request import RequestAborted
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.sampling_params import SamplingParams
from minisrv.wire.events import Event
from minisrv.wire.failures import failure_reply
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    DescribeMsg,
    Failure,
    Finish,
    TokenizeMsg,
)
from tests.support.http_server import MODEL
from tests.support.scripted_backend import reply, start_of

Sent = list[tuple[int, TokenizeMsg | AbortMsg]]


def make_registry(**options: Any) -> tuple[RequestRegistry, Sent]:
    registry = RequestRegistry(ServerConfig(**options))
    sent: Sent = []
    registry.connect(lambda index, message: sent.append((index, message)))
    registry.set_ready(MODEL)
    return registry, sent


def make_message(uid: int, n: int = 1) -> TokenizeMsg:
    return TokenizeMsg(uid=uid, prompt="hi", sampling=SamplingParams(n=n))


def failure_of(uid: int) -> Failure:
    return Failure(
        uid=uid, message="no", status=400, error_type="invalid_request_error", code=None, param=None
    )


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def test_a_uid_is_open_until_its_final_comes() -> None:
    registry, sent = make_registry()
    base = registry.open(2)
    registry.send(make_message(base, n=2))
    assert registry.num_open == 2
    registry.deliver(reply(base, "a", 1, Finish.STOP))
    assert registry.num_open == 1
    registry.deliver(failure_reply([failure_of(base + 1)]))
    assert registry.num_open == 0
    assert len(sent) == 1


def test_an_aborted_uid_counts_until_its_final_comes() -> None:
    registry, _ = make_registry(max_open_requests=1)
    base = registry.open()
    registry.send(make_message(base))
    assert registry.abort(base)
    with pytest.raises(OverloadedError):
        registry.open()
    registry.deliver(reply(base, finish=Finish.ABORT))
    assert registry.open() == base + 1


def test_abort_is_sent_once_and_only_for_what_runs() -> None:
    registry, sent = make_registry()
    base = registry.open(3)
    registry.send(make_message(base, n=3))
    registry.deliver(reply(base + 1, "a", 1, Finish.STOP))
    assert registry.abort(base)
    assert not registry.abort(base)
    assert not registry.abort(12345)
    assert sent[1:] == [(0, AbortMsg(uids=(base, base + 2)))]


def test_an_unsent_request_is_released_without_a_message() -> None:
    registry, sent = make_registry()
    registry.abort(registry.open(2))
    assert (registry.num_open, sent) == (0, [])


def test_an_aborted_request_is_not_sent() -> None:
    registry, sent = make_registry()
    base = registry.open()
    registry.abort(base)
    registry.send(make_message(base))
    assert sent == []


def test_tokenizers_take_turns() -> None:
    registry, sent = make_registry(num_tokenizers=3)
    for _ in range(6):
        registry.send(make_message(registry.open()))
    assert [index for index, _ in sent] == [0, 1, 2, 0, 1, 2]


def test_a_late_reader_gets_one_event_with_all_the_text() -> None:
    async def check() -> None:
        registry, _ = make_registry()
        base = registry.open()
        registry.deliver(reply(base, "a", 1, start=start_of(base)))
        for i in range(2, 100):
            registry.deliver(reply(base, "b", i))
        (event,) = await registry.next_events(base)
        assert (event.text, event.output_tokens, event.final) == ("a" + "b" * 98, 99, False)
        assert event.start == start_of(base)

    finish(check())


def test_a_reader_of_the_whole_sleeps_until_the_last_final_or_a_failure() -> None:
    async def check(fail: bool) -> None:
        registry, _ = make_registry()
        base = registry.open(2)
        reader = asyncio.create_task(registry.all_events(base))
        for i in range(3):
            registry.deliver(reply(base, "a", i + 1))
            await asyncio.sleep(0)
        registry.deliver(reply(base, "", 4, Finish.STOP))
        await asyncio.sleep(0.01)
        assert not reader.done()
        if fail:
            registry.deliver(failure_reply([failure_of(base + 1)]))
            assert [event.failure is not None for event in await reader] == [False, True]
        else:
            registry.deliver(reply(base + 1, "b", 1, Finish.LENGTH))
            assert [event.text for event in await reader] == ["aaa", "b"]

    finish(check(fail=False))
    finish(check(fail=True))


def test_silence_is_an_empty_list_and_loses_nothing() -> None:
    async def check() -> None:
        registry, _ = make_registry()
        base = registry.open()
        assert await registry.next_events(base, 0.01) == []
        registry.deliver(reply(base, "a", 1))
        assert [event.text for event in await registry.next_events(base, 0.01)] == ["a"]

    finish(check())


def test_abort_wakes_the_reader() -> None:
    async def check() -> None:
        registry, _ = make_registry()
        for read in (registry.next_events, registry.all_events):
            base = registry.open()
            reader = asyncio.create_task(read(base))
            await asyncio.sleep(0)
            registry.abort(base)
            with pytest.raises(RequestAborted):
                await reader

    finish(check())


def test_leaving_the_events_early_aborts() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        base = registry.open()
        registry.send(make_message(base))
        registry.deliver(reply(base, "a", 1))
        events = registry.events(base)
        assert (await anext(events)).text == "a"
        await events.aclose()
        assert sent[1:] == [(0, AbortMsg(uids=(base,)))]

    finish(check())


def test_an_abort_from_behind_is_a_failure() -> None:
    async def check() -> None:
        registry, _ = make_registry()
        base = registry.open()
        registry.deliver(reply(base, "", 0, Finish.ABORT))
        (event,) = await registry.all_events(base)
        with pytest.raises(RequestFailedError) as raised:
            event.raise_failure()
        assert raised.value.code == "request_aborted"

    finish(check())


def test_the_death_of_the_engine_reaches_every_reader() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        bases = [registry.open(2) for _ in range(3)]
        readers = [asyncio.create_task(_drain(registry, base)) for base in bases]
        await asyncio.sleep(0)
        registry.fail_all(EngineDeadError("gone"))
        registry.fail_all(EngineDeadError("a later word"))
        for events in await asyncio.gather(*readers):
            assert [event.failure.message for event in events if event.failure] == ["gone"] * 2
        with pytest.raises(RequestFailedError, match="gone"):
            registry.open()
        assert (registry.num_open, sent) == (0, [])

    finish(check())


async def _drain(registry: RequestRegistry, base: int) -> list[Event]:
    return [event async for event in registry.events(base)]


def test_before_it_is_ready_nothing_opens() -> None:
    registry = RequestRegistry(ServerConfig())
    registry.set_progress("weights", 0.5)
    with pytest.raises(NotReadyError, match="weights, 50%"):
        registry.open()


def test_a_dead_registry_does_not_become_ready() -> None:
    registry = RequestRegistry(ServerConfig())
    registry.connect(lambda index, message: None)
    registry.fail_all(EngineDeadError("gone"))
    registry.set_ready(MODEL)
    with pytest.raises(RequestFailedError):
        registry.open()


@dataclass
class Expected:
    """A client request as the model of the state machine knows it."""

    n: int
    sent: bool = False
    aborted: bool = False
    texts: dict[int, str] = field(default_factory=dict)
    finals: set[int] = field(default_factory=set)
    read_texts: dict[int, str] = field(default_factory=dict)
    read_finals: list[int] = field(default_factory=list)


class RegistryMachine(RuleBasedStateMachine):
    """Any order of opening, sending, replies, failures, aborts and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.registry, self.sent = make_registry(max_open_requests=12, num_tokenizers=2)
        self.expected: dict[int, Expected] = {}

    def teardown(self) -> None:
        self.loop.close()

    def open_uids(self, base: int) -> set[int]:
        """The model's count: with a final, or aborted unsent, a uid is closed."""
        expected = self.expected[base]
        if expected.aborted and not expected.sent:
            return set()
        return set(range(base, base + expected.n)) - expected.finals

    def a_base(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.expected)))

    @rule(n=st.integers(1, 5))
    def open(self, n: int) -> None:
        total = sum(len(self.open_uids(base)) for base in self.expected)
        if total + n > 12:
            with pytest.raises(OverloadedError):
                self.registry.open(n)
        else:
            self.expected[self.registry.open(n)] = Expected(n)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        base = self.a_base(data)
        expected = self.expected[base]
        if expected.sent or expected.aborted:
            return
        self.registry.send(make_message(base, expected.n))
        expected.sent = True

    @precondition(lambda self: self.expected)
    @rule(
        data=st.data(),
        text=st.text(max_size=3),
        end=st.sampled_from(["", "", "", "finish", "failure", "abort"]),
    )
    def answer(self, data: st.DataObject, text: str, end: str) -> None:
        """A reply to any uid of a sent request, also to one that has ended."""
        base = self.a_base(data)
        expected = self.expected[base]
        uid = data.draw(st.integers(base, base + expected.n - 1))
        if not expected.sent:
            return
        if end == "failure":
            self.registry.deliver(failure_reply([failure_of(uid)]))
        else:
            finish = {"": Finish.NONE, "finish": Finish.STOP, "abort": Finish.ABORT}[end]
            self.registry.deliver(reply(uid, text, 1, finish))
            if uid not in expected.finals:
                expected.texts[uid] = expected.texts.get(uid, "") + text
        if end:
            expected.finals.add(uid)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        base = self.a_base(data)
        expected = self.expected[base]
        running = self.open_uids(base) if not expected.aborted else set()
        num_sent = len(self.sent)
        assert self.registry.abort(base) == bool(running)
        messages = self.sent[num_sent:]
        assert [m.uids for _, m in messages if isinstance(m, AbortMsg)] == (
            [tuple(sorted(running))] if running and expected.sent else []
        )
        if messages:
            tokenizers = {i for i, m in self.sent if isinstance(m, TokenizeMsg) and m.uid == base}
            assert {index for index, _ in messages} == tokenizers
        expected.aborted = True

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        base = self.a_base(data)
        expected = self.expected[base]
        if expected.aborted:
            assert not self.registry.is_open(base)
            return
        if not self.registry.is_open(base):
            assert sorted(expected.read_finals) == list(range(base, base + expected.n))
            assert expected.read_texts == expected.texts
            return
        for event in self.loop.run_until_complete(self.registry.next_events(base, 0)):
            texts = expected.read_texts
            if event.deltas:
                texts[event.uid] = texts.get(event.uid, "") + event.text
            assert event.final == (event.uid in expected.finals)
            if event.final:
                expected.read_finals.append(event.uid)
        assert expected.read_texts == expected.texts

    @invariant()
    def the_count_of_open_uids_is_right(self) -> None:
        assert self.registry.num_open == sum(len(self.open_uids(base)) for base in self.expected)


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def ask(registry: RequestRegistry) -> asyncio.Task[Any]:
    return asyncio.create_task(registry.ask(lambda query: DescribeMsg(query=query)))


def test_a_query_counts_until_its_answer_comes_even_if_nobody_waits_for_it() -> None:
    async def check() -> None:
        registry, sent = make_registry(max_open_requests=1)
        asking = ask(registry)
        await asyncio.sleep(0)
        assert registry.num_open == 1
        with pytest.raises(OverloadedError):
            registry.open()
        with pytest.raises(OverloadedError):
            await ask(registry)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert registry.num_open == 1
        assert sent == [(0, DescribeMsg(query=1)), (0, AbortMsg(uids=(1,)))]
        registry.receive(AnswerMsg(query=1))
        registry.receive(AnswerMsg(query=1))
        assert registry.num_open == 0
        assert registry.open() == 2, "uids and queries share their numbers"

    finish(check())


def test_an_answered_query_is_not_aborted() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        asking = ask(registry)
        await asyncio.sleep(0)
        registry.receive(AnswerMsg(query=1, value={"a": 1}))
        assert await asking == {"a": 1}
        assert sent == [(0, DescribeMsg(query=1))]
        assert registry.num_open == 0

    finish(check())


def test_a_query_without_an_answer_is_a_503_and_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        registry, sent = make_registry()
        with pytest.raises(MinisrvError, match="no answer came") as failure:
            await ask(registry)
        assert (failure.value.http_status, failure.value.code) == (503, "request_timeout")
        assert sent[1] == (0, AbortMsg(uids=(1,)))
        assert registry.num_open == 1

    monkeypatch.setattr(queries, "TIMEOUT_S", 0.01)
    finish(check())


def test_what_cannot_be_sent_is_refused_counted_and_holds_nothing() -> None:
    async def check() -> None:
        registry, _ = make_registry()

        def refuse(index: int, message: Any) -> None:
            raise OverloadedError("full", reason="inbox")

        registry.connect(refuse)
        base = registry.open()
        with pytest.raises(OverloadedError):
            registry.send(make_message(base))
        with pytest.raises(OverloadedError):
            await ask(registry)
        assert registry.refused == {"inbox": 2}
        registry.abort(base)
        assert registry.num_open == 0

    finish(check())


def test_the_end_of_the_engine_fails_queries_and_frees_their_permits() -> None:
    async def check() -> None:
        registry, sent = make_registry()
        asking = ask(registry)
        await asyncio.sleep(0)
        registry.fail_all(EngineDeadError("gone"))
        with pytest.raises(EngineDeadError):
            await asking
        assert registry.num_open == 0
        assert len(sent) == 1

    finish(check())
