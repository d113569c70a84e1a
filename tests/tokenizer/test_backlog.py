"""Work that waits at a tokenizer, and aborts that do not."""

import pytest

from minisrv.sampling_params import SamplingParams
from minisrv.tokenizer.backlog import Backlog, Work
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    DescribeMsg,
    EncodeMsg,
    FlushMsg,
    TokenizeMsg,
    UserReply,
)


def request(uid: int, n: int = 1, key: int = 0) -> TokenizeMsg:
    return TokenizeMsg(uid=uid, prompt="hi", sampling=SamplingParams(n=n), key=key)


def test_work_is_taken_in_order_and_its_bytes_count_when_it_is_taken() -> None:
    backlog = Backlog()
    work: list[Work] = [request(1), DescribeMsg(query=2), FlushMsg(query=3)]
    assert backlog.add([(message, 10 + i) for i, message in enumerate(work)]) == []
    assert backlog.taken_bytes == 0
    assert [backlog.take() for _ in work] == work
    assert backlog.taken_bytes == 33
    assert not backlog


def test_an_abort_removes_a_waiting_request_with_a_final_for_each_choice() -> None:
    backlog = Backlog()
    backlog.add([(request(1), 10), (request(2, n=3), 20), (request(5), 30)])
    (final,) = backlog.add([(AbortMsg(uids=(2, 3, 4)), 5)])
    assert isinstance(final, UserReply)
    assert [(f.uid, f.code) for f in final.failures] == [(i, "request_aborted") for i in (2, 3, 4)]
    assert backlog.taken_bytes == 25
    assert [backlog.take(), backlog.take()] == [request(1), request(5)]


@pytest.mark.parametrize(
    "query", [DescribeMsg(query=7), EncodeMsg(query=7, prompt="x", add_special_tokens=True)]
)
def test_an_abort_removes_a_waiting_query_with_its_answer(query: Work) -> None:
    backlog = Backlog()
    (answer,) = backlog.add([(query, 10), (AbortMsg(uids=(7,)), 5)])
    assert isinstance(answer, AnswerMsg)
    assert answer.query == 7
    assert answer.failure is not None
    assert answer.failure.code == "request_aborted"
    assert not backlog


def test_what_is_not_here_any_more_is_aborted_at_the_scheduler() -> None:
    backlog = Backlog()
    backlog.add([(request(1), 10), (request(2), 10)])
    backlog.take()
    outgoing = backlog.add([(AbortMsg(uids=(1,)), 5), (AbortMsg(uids=(2, 9)), 5)])
    assert isinstance(outgoing[0], UserReply)
    assert outgoing[1:] == [AbortMsg(uids=(1, 9))]


def test_a_flush_is_answered_by_the_scheduler_even_if_nobody_waits_for_it() -> None:
    backlog = Backlog()
    flush = FlushMsg(query=3)
    assert backlog.add([(flush, 10), (AbortMsg(uids=(3,)), 5)]) == [AbortMsg(uids=(3,))]
    assert backlog.take() == flush


def test_keys_take_turns_and_each_has_its_own_order() -> None:
    backlog = Backlog()
    backlog.add([(request(uid, key=1), 10) for uid in range(1, 6)])
    backlog.add([(request(uid, key=2), 10) for uid in (6, 7)] + [(request(8, key=3), 10)])
    order = [backlog.take() for _ in range(8)]
    assert [work.uid for work in order if isinstance(work, TokenizeMsg)] == [1, 6, 8, 2, 7, 3, 4, 5]
    assert not backlog


def test_a_flush_waits_for_what_came_before_it_from_any_key_and_not_for_what_came_after() -> None:
    backlog = Backlog()
    flush = FlushMsg(query=9)
    backlog.add([(request(1, key=1), 10), (request(2, key=2), 10), (request(3, key=2), 10)])
    backlog.add([(flush, 10), (request(4, key=1), 10), (request(5, key=3), 10)])
    order = [backlog.take() for _ in range(6)]
    before = order[: order.index(flush)]
    assert all(request(uid, key=key) in before for uid, key in ((1, 1), (2, 2), (3, 2)))
    backlog.add([(request(6), 10), (flush, 10), (request(7), 10)])
    assert [backlog.take() for _ in range(3)] == [request(6), flush, request(7)]
