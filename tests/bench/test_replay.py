"""A trace becomes conversations with the lengths, blocks, sessions and times of the trace."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minisrv.bench.replay import Replay
from minisrv.bench.traces import BLOCK_TOKENS, TraceRequest


@given(st.integers(1, 5000), st.sampled_from([1, 4, 512]))
def test_prompts_have_their_length_and_equal_blocks_are_equal(length: int, divisor: int) -> None:
    block_ids = tuple(range(-(-length // BLOCK_TOKENS)))
    trace = [TraceRequest(0, length, 3, block_ids), TraceRequest(1, length, 3, block_ids)]
    first, second = Replay(trace, divisor=divisor).conversations((1,))
    assert first.turns[0].input_tokens == max(1, length // divisor)
    assert first.turns[0].segments == second.turns[0].segments


def test_requests_without_blocks_share_nothing() -> None:
    trace = [TraceRequest(0, 10, 3), TraceRequest(1, 10, 3)]
    made = Replay(trace).conversations((1,)) + Replay(trace).conversations((2,))
    assert len({conversation.turns[0].segments for conversation in made}) == 4


def test_a_session_is_one_conversation() -> None:
    trace = [
        TraceRequest(0, 10, 5, session="a"),
        TraceRequest(2, 7, 1, session="b"),
        TraceRequest(4, 40, 6, session="a"),
        TraceRequest(8, 20, 2, session="a"),  # shorter than what was said before
    ]
    first, second = Replay(trace, speed=2).conversations((0,))
    assert [turn.input_tokens for turn in first.turns] == [10, 40 - 15, 1]
    assert [turn.output_tokens for turn in first.turns] == [5, 6, 2]
    assert [turn.arrival_s for turn in first.turns] == [0, 2, 4]
    assert (second.arrival_s, len(second.turns)) == (1, 1)
