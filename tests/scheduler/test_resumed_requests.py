"""A request that one engine has begun continues on another where the client's text ends.

The oracle is the same request in one piece. The first scheduler, engine and detokenizer are left
after any reply; the second ones know only what had reached the client.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minisrv.llm import LLM
from minisrv.sampling_params import Grammar, SamplingParams, TokenBias
from minisrv.wire.events import Event, gather_reply
from minisrv.wire.messages import AbortMsg, GenerateMsg, Produced, TokenizeMsg

MESSAGES: tuple[dict[str, Any], ...] = ({"role": "user", "content": "Count from 1 to 12."},)
SCHEMA = '{"type":"object","properties":{"n":{"type":"string","maxLength":12}},"required":["n"]}'
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
SEEDED: dict[str, Any] = {"temperature": 1.2, "seed": 5, "max_tokens": 24, "ignore_eos": True}
CASES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "choices": {**SEEDED, "n": 4, "max_tokens": 12},
    "penalties": {
        **SEEDED,
        "repetition_penalty": 1.5,
        "presence_penalty": 1.5,
        "frequency_penalty": 1.5,
        "logit_bias": (TokenBias(token_id=300, value=2.0),),
    },
    "logprobs": {**SEEDED, "logprobs": 2},
    "filters": {**SEEDED, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "least number of tokens": {**GREEDY, "min_tokens": 20, "stop": ("1",)},
    # Each number is held back until it is known not to begin a stop string.
    "stop string": {**GREEDY, "stop": ("4 5 5", "10 11")},
    "stop string that never comes": {**GREEDY, "stop": ("3 4 5 5",)},
    "grammar": {**SEEDED, "grammar": Grammar(kind="json_schema", text=SCHEMA)},
    "logprobs of the prompt": {**SEEDED, "logprobs": 1, "prompt_logprobs": 1},
    "echo": {**SEEDED, "echo": True, "logprobs": 1, "prompt_logprobs": 1},
}


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[LLM, LLM]]:
    options: dict[str, Any] = {
        "dtype": "float32",
        "num_threads": 1,
        "page_size": 4,
        "num_pages": 2000,
    }
    with LLM("demo", **options) as first, LLM("demo", **options) as second:
        yield first, second


def serve(llm: LLM, message: GenerateMsg, events: dict[int, Event]) -> Iterator[None]:
    """Serve a request; yields after each reply, whose parts are then in `events`."""
    llm._channel.inbox.append(message)
    while not all(event.final for event in events.values()):
        llm._loop.turn()
        while llm._channel.outbox:
            reply, aborts = llm._detokenizer.handle(llm._channel.outbox.popleft())
            if aborts is not None:
                llm._channel.inbox.append(aborts)
            if reply is not None:
                gather_reply(reply, events.get, 0.0)
                yield


def leave(llm: LLM, events: dict[int, Event]) -> None:
    """End what the engine has begun, if anything; nothing of it is kept."""
    llm._channel.inbox.append(AbortMsg(uids=tuple(events)))
    while llm._channel.inbox or llm._loop.busy:
        llm._loop.turn()
    while llm._channel.outbox:
        llm._detokenizer.handle(llm._channel.outbox.popleft())


def events_of(message: GenerateMsg) -> dict[int, Event]:
    return {message.uid + i: Event(message.uid + i, i) for i in range(message.sampling.n)}


def shown(event: Event) -> tuple[Any, ...]:
    """All that a client sees of a choice and that must not differ at all."""
    assert event.failure is None, event.failure
    spelled = [part.spellings for part in event.logprobs]
    offsets = [part.offsets.tolist() for part in event.logprobs]
    text = (event.text, event.reasoning_text, event.reasoning_tokens, event.token_ids)
    ends = (event.output_tokens, event.finish, event.stop_reason)
    echo = event.echo and event.echo.text
    return (*text, *ends, spelled, offsets, echo)


@pytest.mark.parametrize("name", CASES)
def test_a_request_that_is_resumed_after_any_reply_gives_the_same_answer(
    name: str, engines: tuple[LLM, LLM]
) -> None:
    first, second = engines
    sampling = SamplingParams(**CASES[name])
    prompt: dict[str, Any] = {"prompt": "Once"} if sampling.echo else {"messages": MESSAGES}
    uncut = TokenizeMsg(uid=0, sampling=sampling, **prompt)
    message = first.prepare(uncut)
    whole = events_of(message)
    num_replies = sum(1 for _ in serve(first, message, whole))
    assert num_replies >= 4
    # Text that may belong to a stop string is held back in a few places only.
    cuts = range(0, num_replies, 3 if sampling.stop else 8)
    for cut in sorted({*cuts, 1, num_replies - 1}):
        message = first.prepare(uncut)
        events = events_of(message)
        serving = serve(first, message, events)
        for _ in range(cut):
            next(serving)
        leave(first, events)
        unfinished = {uid: event for uid, event in events.items() if not event.final}
        resumed = tuple(
            Produced(uid=uid, token_ids=np.array(event.token_ids, np.int32))
            for uid, event in unfinished.items()
        )
        for _ in serve(second, replace(message, resumed=resumed), unfinished):
            pass
        for one, (uid, event) in zip(whole.values(), events.items(), strict=True):
            assert shown(event) == shown(one), f"cut after reply {cut}, uid {uid}"
            for ours, theirs in zip(event.logprobs, one.logprobs, strict=True):
                np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        leave(second, events)
        assert second._detokenizer.num_requests == 0
        second._loop.scheduler.check()
