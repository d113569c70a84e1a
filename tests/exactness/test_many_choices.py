"""128 choices of one prompt: it is computed once, kept once, and every choice is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minisrv.llm import LLM
from minisrv.sampling_params import Grammar, SamplingParams
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.wire.messages import AbortMsg, Finish, TokenizeMsg
from tests.support.checkpoints import EOS_ID, make_checkpoint
from tests.support.oracle import load_reference, make_prompts
from tests.support.sampled_oracle import check_tokens

N, PAGE, LENGTH, COUNT = 128, 16, 500, 6
SHARED = (LENGTH - 1) // PAGE  # the last token is computed for each choice: its logits are drawn
PROMPT = make_prompts(2, EOS_ID, longest=LENGTH)[1]
PARAMS = SamplingParams(temperature=1.0, seed=3, n=N, max_tokens=COUNT, ignore_eos=True)
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "page_size": PAGE}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2")


@pytest.fixture(scope="module")
def texts(model_dir: Path) -> list[list[int]]:
    """What each choice must be; the oracle has seen them."""
    with LLM(model_dir, **OPTIONS, num_pages=1000) as llm:
        (output,) = llm.generate_outputs([PROMPT], PARAMS, use_tqdm=False)
        (alone,) = llm.generate_outputs([PROMPT], replace(PARAMS, n=1), use_tqdm=False)
    texts = [choice.token_ids for choice in output.outputs]
    assert alone.outputs[0].token_ids == texts[0]
    model = load_reference(model_dir)
    for choice, ids in enumerate(texts):
        check_tokens(model, PROMPT, ids, PARAMS, choice)
    assert len({tuple(ids) for ids in texts}) > 100
    return texts


def send(llm: LLM, params: SamplingParams) -> int:
    """Queue the request; returns the uid of its first choice."""
    message = llm.prepare(TokenizeMsg(uid=0, prompt=np.array(PROMPT, np.int32), sampling=params))
    llm._channel.inbox.append(message)
    return message.uid


def pages_in_use(loop: SchedulerLoop) -> int:
    return loop.stats.make_message(loop.scheduler).pages_used


def collect(llm: LLM, first_uid: int, tokens: list[list[int]], ends: dict[int, Finish]) -> None:
    while llm._channel.outbox:
        message = llm._channel.outbox.popleft()
        assert not message.failures
        for uid, token, finish in zip(
            message.uids.tolist(), message.token_ids.tolist(), message.finishes, strict=True
        ):
            if finish != Finish.ABORT:
                tokens[uid - first_uid].append(token)
            if finish:
                assert uid not in ends
                ends[uid] = Finish(finish)


def is_idle_and_whole(loop: SchedulerLoop) -> bool:
    """Nothing is held; what the tree keeps could all be given away."""
    scheduler, cache = loop.scheduler, loop.scheduler.cache
    scheduler.check()
    return (
        scheduler.num_open == 0
        and cache.rows.num_free == cache.rows.size
        and cache.num_available == cache.pages.size
    )


@pytest.mark.parametrize(
    ("depth", "budget", "rows"), [(0, 1024, 256), (1, 64, 256), (1, 200, 40)], ids=str
)
def test_the_prompt_is_computed_and_kept_once(
    model_dir: Path, texts: list[list[int]], depth: int, budget: int, rows: int
) -> None:
    options = {"overlap_depth": depth, "max_prefill_tokens": budget, "max_running_requests": rows}
    with LLM(model_dir, **OPTIONS, **options, num_pages=SHARED + 2 * N) as llm:
        loop = llm._loop
        first = send(llm, PARAMS)
        tokens: list[list[int]] = [[] for _ in range(N)]
        ends: dict[int, Finish] = {}
        most_pages = 0
        while len(ends) < N:
            loop.turn()
            collect(llm, first, tokens, ends)
            most_pages = max(most_pages, pages_in_use(loop))
            loop.scheduler.check()
        assert tokens == texts
        # All choices have the first SHARED pages in common, and one or two of their own.
        assert most_pages <= SHARED + min(N, rows) * 2
        stats = loop.stats.make_message(loop.scheduler)
        tails = LENGTH + (N - 1) * (LENGTH - SHARED * PAGE)
        dropped = min(N, rows) if depth else 0
        decoded = stats.step_tokens.total - tails
        assert N * (COUNT - 1) <= decoded <= N * (COUNT - 1) + dropped
        assert stats.prompt_tokens == N * LENGTH
        assert stats.cached_tokens == (N - 1) * SHARED * PAGE
        assert is_idle_and_whole(loop)


def test_so_few_pages_that_choices_are_retracted_give_the_same(
    model_dir: Path, texts: list[list[int]]
) -> None:
    with LLM(model_dir, **OPTIONS, num_pages=SHARED + 20, max_prefill_tokens=64) as llm:
        params = replace(PARAMS, max_tokens=COUNT + 60)
        (output,) = llm.generate_outputs([PROMPT], params, use_tqdm=False)
        assert [choice.token_ids[:COUNT] for choice in output.outputs] == texts
        assert llm._loop.scheduler.num_preemptions > 0
        assert is_idle_and_whole(llm._loop)


@pytest.fixture(scope="module")
def shared_llm(model_dir: Path) -> Iterator[LLM]:
    options = {"overlap_depth": 1, "max_prefill_tokens": 100}
    with LLM(model_dir, **OPTIONS, **options, num_pages=SHARED + 2 * N) as llm:
        yield llm


CASES = {
    "plain": PARAMS,
    "penalties": replace(PARAMS, presence_penalty=1.0, repetition_penalty=1.3),
    "grammar": replace(PARAMS, grammar=Grammar.regex("[a-z]{40}")),
}


@pytest.mark.parametrize("turns", [1, 3, 6, 8, 10])
@pytest.mark.parametrize("case", CASES)
def test_an_abort_of_all_or_some_leaks_nothing(
    shared_llm: LLM, texts: list[list[int]], turns: int, case: str
) -> None:
    loop = shared_llm._loop
    loop.scheduler.cache.evict(loop.scheduler.cache.tree.num_evictable)
    first = send(shared_llm, replace(CASES[case], max_tokens=30))
    tokens: list[list[int]] = [[] for _ in range(N)]
    ends: dict[int, Finish] = {}
    for _ in range(turns):
        loop.turn()
    some = range(first, first + N, 2)
    shared_llm._channel.inbox.append(AbortMsg(uids=tuple(some)))
    loop.turn()
    collect(shared_llm, first, tokens, ends)
    assert {uid for uid, end in ends.items() if end is Finish.ABORT} == set(some)
    loop.scheduler.check()
    shared_llm._channel.inbox.append(AbortMsg(uids=tuple(range(first, first + N))))
    while loop.busy or shared_llm._channel.inbox:
        loop.turn()
    collect(shared_llm, first, tokens, ends)
    assert len(ends) == N
    assert is_idle_and_whole(loop)
    (again,) = shared_llm.generate_outputs([PROMPT], PARAMS, use_tqdm=False)
    assert [choice.token_ids for choice in again.outputs] == texts
