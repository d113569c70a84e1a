"""Workloads have the shape that was asked for, and the same requests for the same seed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.bench.load import Load, make_load, parse_loads
from minisrv.bench.prompts import ChatPrompts, IdPrompts, Segment, TextPrompts
from minisrv.bench.reply import Reply
from minisrv.bench.workloads import Range, Shape, make_conversations, with_arrivals
from minisrv.errors import ConfigError

SHAPE = Shape(Range(5, 9), Range(3, 4))


def test_equal_seeds_make_equal_requests() -> None:
    made = [make_conversations(SHAPE, 50, seed) for seed in [(7, 0), (7, 0), (7, 1), (8, 0)]]
    assert made[0] == made[1]
    assert len({str(conversations) for conversations in made}) == 3


def test_lengths_are_in_their_ranges() -> None:
    turns = [turn for made in make_conversations(SHAPE, 300, (0,)) for turn in made.turns]
    assert len(turns) == 300
    assert {turn.input_tokens for turn in turns} == {5, 6, 7, 8, 9}
    assert {turn.output_tokens for turn in turns} == {3, 4}


def test_prefixes_are_shared_and_the_rest_is_not() -> None:
    shape = Shape(Range(4, 4), Range(1, 1), prefix_tokens=20, prefixes=3)
    prompts = IdPrompts(100, 900)
    texts = [
        json.loads(prompts.prompt([prompts.part(made.turns[0].segments, first=True)]))
        for made in make_conversations(shape, 60, (0,))
    ]
    assert all(len(ids) == 24 for ids in texts)
    assert len({tuple(ids[:20]) for ids in texts}) == 3
    assert len({tuple(ids[20:]) for ids in texts}) == 60


def test_conversations_have_as_many_turns_as_requests_were_asked_for() -> None:
    shape = Shape(Range(4, 4), Range(1, 1), turns=Range(2, 5), think_s=0.5)
    made = make_conversations(shape, 100, (0,))
    assert sum(len(conversation.turns) for conversation in made) == 100
    assert {len(conversation.turns) for conversation in made[:-1]} == {2, 3, 4, 5}
    pauses = [turn.think_s for conversation in made for turn in conversation.turns[1:]]
    assert np.mean(pauses) == pytest.approx(0.5, rel=0.4)
    assert {conversation.turns[0].think_s for conversation in made} == {0.0}


def test_arrivals() -> None:
    made = make_conversations(SHAPE, 2000, (0,))
    even = [conversation.arrival_s for conversation in with_arrivals(made, 4, False, (0,))]
    assert even[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
    poisson = [conversation.arrival_s for conversation in with_arrivals(made, 4, True, (0,))]
    gaps = np.diff(poisson)
    # An exponential distribution: its deviation is its mean.
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert np.std(gaps) == pytest.approx(0.25, rel=0.1)
    assert make_load(Load(rate=4), SHAPE, None, (0,))[0].arrival_s == 0


@given(st.integers(1, 300), st.integers(1, 300))
def test_segments_of_equal_keys_begin_with_the_same_tokens(short: int, long: int) -> None:
    prompts = IdPrompts(100, 90_000)
    parts = [prompts.part([Segment((3, 1), n)], first=True).split(",") for n in (short, long)]
    assert [len(part) for part in parts] == [short, long]
    common = min(short, long)
    assert parts[0][:common] == parts[1][:common]
    assert all(100 <= int(id) < 90_000 for part in parts for id in part)


def test_text_has_the_tokens_that_were_asked_for() -> None:
    prompts = TextPrompts(tokens_per_word=1.5, overhead=4)
    segments = [Segment((1,), 100), Segment((2,), 54)]
    assert len(prompts.part(segments, first=True).split()) == 100
    assert len(prompts.part(segments, first=False).split()) == 103
    assert prompts.part([Segment((1,), 1)], first=True).strip()


def test_a_conversation_holds_the_answers() -> None:
    reply = Reply()
    reply.text, reply.token_ids = " yes", [4, 5]
    ids = IdPrompts(1, 9)
    assert json.loads(ids.prompt(["1,2", ids.answer(reply), "3"])) == [1, 2, 4, 5, 3]
    text = TextPrompts()
    assert json.loads(text.prompt([" a", text.answer(reply), " b"])) == " a yes b"
    chat = ChatPrompts()
    assert json.loads(chat.prompt([" a", chat.answer(reply), " b"])) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "b"},
    ]


def test_points_of_load() -> None:
    assert parse_loads("1,4", None, "poisson") == [Load(1), Load(4)]
    assert parse_loads(None, "0.5", "constant") == [Load(rate=0.5, arrivals="constant")]
    assert [load.default_requests for load in parse_loads("1,16", None, "poisson")] == [32, 128]
    for concurrency, rate in [("0", None), ("1,x", None), ("1.5", None), (None, "inf"), ("1", "1")]:
        with pytest.raises(ConfigError):
            parse_loads(concurrency, rate, "poisson")


@pytest.mark.parametrize("text", ["", "0", "5-3", "a", "-3", "1-2-3"])
def test_a_wrong_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a number"):
        Range.parse(text)
