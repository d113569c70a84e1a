"""The wire form of messages: lossless, and closed to what a socket may not carry."""

from dataclasses import fields

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.errors import DecodeError, InvalidRequestError
from minisrv.sampling_params import SamplingParams, TokenBias
from minisrv.wire.arrays import token_array
from minisrv.wire.codec import decode, encode
from minisrv.wire.failures import failure_reply
from minisrv.wire.messages import (
    DETOKENIZER_INBOX,
    FRONTEND_INBOX,
    KV_EVENTS_INBOX,
    SCHEDULER_INBOX,
    TOKENIZER_INBOX,
    AbortMsg,
    AnswerMsg,
    DecodeMsg,
    DescribeMsg,
    DetokenizeMsg,
    EncodeMsg,
    Failure,
    FlushMsg,
    GenerateMsg,
    Histogram,
    PromptsMsg,
    RenderMsg,
    ShowTreeMsg,
    Start,
    StatsMsg,
    TakenMsg,
    TokenizeMsg,
    TreeChangesMsg,
    UserReply,
)

ALL = TOKENIZER_INBOX + SCHEDULER_INBOX + DETOKENIZER_INBOX + KV_EVENTS_INBOX + FRONTEND_INBOX


def same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)  # type: ignore[attr-defined]
    if hasattr(left, "__dataclass_fields__"):
        return type(left) is type(right) and all(
            same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)
        )
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


START = Start(
    uid=7, prompt_tokens=9, cached_tokens=4, min_tokens=0, stop=("\n",), skip_special_tokens=True
)
FAILURE = Failure.from_error(9, InvalidRequestError("no", param="prompt"))
EXAMPLES = [
    TokenizeMsg(
        uid=2**40, prompt="h\u00e9llo \U0001f600", sampling=SamplingParams(seed=-5, temperature=0.5)
    ),
    TokenizeMsg(
        uid=1,
        prompt=np.array([1, 2, 3], np.int32),
        sampling=SamplingParams(stop=("a", "b"), n=3, logit_bias=(TokenBias(5, -1.5),)),
    ),
    TokenizeMsg(
        uid=1,
        messages=({"role": "user", "content": [{"type": "text", "text": "x"}]},),
        template_kwargs={"enable_thinking": False},
        sampling=SamplingParams(stop_token_ids=(5,)),
    ),
    AbortMsg(uids=(1, 2**50)),
    GenerateMsg(uid=1, prompt_ids=np.arange(5, dtype=np.int32), sampling=SamplingParams()),
    DetokenizeMsg(
        uids=np.array([7, 8]),
        token_ids=np.array([1, -1], np.int32),
        finishes=np.array([0, 4], np.uint8),
        starts=(START,),
        failures=(FAILURE,),
    ),
    UserReply(
        uids=np.array([1, 2, 3]),
        texts=("a", "", "\u4f60"),
        output_tokens=np.array([1, 2, 3], np.int32),
        finishes=np.array([0, 1, 3], np.uint8),
        stop_reasons=(None, "STOP", 17),
        new_ids=np.array([3, 4, 5], np.int32),
        num_new_ids=np.array([1, 0, 2], np.int32),
        starts=(START,),
    ),
    failure_reply([FAILURE]),
    UserReply(
        uids=np.array([1]),
        texts=("a",),
        output_tokens=np.array([2], np.int32),
        finishes=np.array([0], np.uint8),
        stop_reasons=(None,),
        new_ids=np.array([3, 4], np.int32),
        num_new_ids=np.array([2], np.int32),
    ),
    EncodeMsg(query=3, prompt="\u00e9", add_special_tokens=True),
    EncodeMsg(
        query=3,
        messages=({"role": "user", "content": "x"},),
        template_kwargs={"a": 1},
        add_special_tokens=False,
        add_generation_prompt=False,
    ),
    DecodeMsg(query=1, token_ids=np.array([5], np.int32), skip_special_tokens=True),
    RenderMsg(query=4, request=TokenizeMsg(uid=0, prompt="a", sampling=SamplingParams(n=2))),
    DescribeMsg(query=2),
    FlushMsg(query=2**40),
    ShowTreeMsg(query=5, max_nodes=100, uids=(1, 2**50), num_tokens=8),
    AnswerMsg(query=2, value={"ids": [1, 2], "text": "\u4f60", "tokens": ["a", None]}),
    AnswerMsg(query=2, failure=FAILURE),
    PromptsMsg(uids=(2**40, 3), prompt_tokens=(2**31 - 1, 1)),
    TakenMsg(tokenizer=1, num_bytes=2**40),
    TreeChangesMsg(
        pages=np.array([1, -1, 5, -1, 5], np.int32),
        token_ids=np.array([7, 8], np.int32),
        salts=("a",),
        begins=True,
    ),
    StatsMsg(
        admitted=7,
        running=1,
        waiting=2,
        pages_used=3,
        num_pages=4,
        page_size=16,
        prompt_tokens=5,
        cached_tokens=6,
        prefilled_tokens=10,
        output_tokens=7,
        preemptions=8,
        steps=9,
        queued_tokens=10,
        prefill_rate=0.5,
        decode_rate=1.5,
        inter_token=Histogram(counts=np.array([1, 2]), total=0.5),
        step_tokens=Histogram(counts=np.array([0]), total=0.0),
    ),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_survives_the_wire(message: object) -> None:
    assert same(decode(encode(message), ALL), message)  # type: ignore[arg-type]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_socket_refuses_the_types_of_others(message: object) -> None:
    others = tuple(kind for kind in ALL if kind is not type(message))
    with pytest.raises(DecodeError):
        decode(encode(message), others)  # type: ignore[arg-type]


@given(st.integers() | st.integers(60, 70).map(lambda bits: 2**bits) | st.just(10**4299))
def test_integers_of_any_size_survive_the_wire(number: int) -> None:
    arguments = {"numbers": [number, -number, number - 1, -number - 1, float(number % 2**60)]}
    message = EncodeMsg(query=1, messages=(arguments,), add_special_tokens=False)
    assert repr(decode(encode(message), ALL)) == repr(message)


def test_an_unknown_extension_is_refused() -> None:
    values = msgpack.unpackb(encode(EXAMPLES[0]))  # type: ignore[arg-type]
    values[3] = msgpack.ExtType(5, b"1")
    with pytest.raises(DecodeError, match="extension"):
        decode(msgpack.packb(values), ALL)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(frame: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(frame, ALL)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_frame_with_a_changed_field_is_refused_or_a_valid_message(message: object, data) -> None:  # type: ignore[no-untyped-def]
    values = msgpack.unpackb(encode(message))  # type: ignore[arg-type]
    values[data.draw(st.integers(0, len(values) - 1))] = data.draw(JSON)
    try:
        decoded = decode(msgpack.packb(values), ALL)
    except DecodeError:
        return
    assert encode(decoded)


def test_columns_of_different_lengths_are_refused() -> None:
    frame = encode(
        DetokenizeMsg(
            uids=np.array([1]),
            token_ids=np.array([1, 2], np.int32),
            finishes=np.array([0], np.uint8),
        )
    )
    with pytest.raises(DecodeError, match="columns"):
        decode(frame, DETOKENIZER_INBOX)


def test_an_invalid_sampling_value_is_refused_on_the_wire() -> None:
    values = msgpack.unpackb(encode(EXAMPLES[0]))  # type: ignore[arg-type]
    good = values[6]
    values[6] = [99.0, *good[1:]]
    with pytest.raises(DecodeError, match="temperature"):
        decode(msgpack.packb(values), TOKENIZER_INBOX)


def test_token_ids_travel_as_the_bytes_of_an_array() -> None:
    ids = np.arange(100_000, dtype=np.int32)
    frame = encode(TokenizeMsg(uid=1, prompt=ids, sampling=SamplingParams()))
    assert ids.tobytes() in frame
    assert len(frame) < ids.nbytes + 500


@pytest.mark.parametrize("num_chars", [(1 << 20) - 500, 1 << 20, 5 << 20])
def test_frames_of_any_size_stay_as_they_are_when_others_are_packed(num_chars: int) -> None:
    messages = [
        TokenizeMsg(uid=uid, prompt=letter * num_chars, sampling=SamplingParams())
        for uid, letter in enumerate("ab")
    ]
    frames = [encode(message) for message in messages]
    assert [decode(frame, TOKENIZER_INBOX) for frame in frames] == messages


def test_a_frame_of_another_epoch_is_refused() -> None:
    frame = encode(DescribeMsg(query=2), epoch=3)
    assert decode(frame, TOKENIZER_INBOX, epoch=3) == DescribeMsg(query=2)
    with pytest.raises(DecodeError, match="epoch 3; this is epoch 4"):
        decode(frame, TOKENIZER_INBOX, epoch=4)


def test_a_token_id_that_no_vocabulary_has_is_an_invalid_request() -> None:
    assert token_array([0, 2**31 - 1]).dtype == np.int32
    for wrong in (2**31, -(2**40)):
        with pytest.raises(InvalidRequestError, match=f"holds token id {wrong}"):
            token_array([5, wrong])
