"""The loop, scheduler and cache together on the hash engine: what a step does for whom."""

from collections import defaultdict
from dataclasses import replace

import pytest

from minisrv.scheduler.loop import SchedulerLoop
from minisrv.wire.messages import AbortMsg, Finish, ShownPrompt, Start
from tests.support.builders import generate_msg, hash_loop
from tests.support.hash_engine import expected_output

VOCAB = 50


class Result:
    """What the loop has told of every request."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, Finish] = {}
        self.starts: dict[int, Start] = {}
        self.failures: dict[int, str] = {}
        self.fields: dict[int, tuple[str | None, str | None]] = {}


def collect(loop: SchedulerLoop, result: Result) -> None:
    while loop.channel.outbox:
        message = loop.channel.outbox.popleft()
        result.starts.update({start.uid: start for start in message.starts})
        for failure in message.failures:
            result.failures[failure.uid] = failure.message
            result.fields[failure.uid] = failure.code, failure.param
        for uid, token, end in zip(
            message.uids.tolist(), message.token_ids.tolist(), message.finishes, strict=True
        ):
            if end != Finish.ABORT:
                result.tokens[uid].append(token)
            if end:
                result.ends[uid] = Finish(end)


def drain(loop: SchedulerLoop) -> Result:
    result = Result()
    for _ in range(10_000):
        if not (loop.busy or loop.channel.inbox):
            return result
        loop.turn()
        loop.scheduler.check()
        collect(loop, result)
    raise AssertionError("the loop does not come to an end")


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("budget", [4, 5, 64])
def test_two_that_arrive_together_compute_their_common_pages_once(depth: int, budget: int) -> None:
    loop = hash_loop(num_pages=30, page_size=4, budget=budget, depth=depth)
    prompt = [1] * 9 + [2] * 8 + [9]
    for uid in (0, 1):
        loop.channel.inbox.append(generate_msg(uid, prompt, max_tokens=5))
    result = drain(loop)
    expected = expected_output(prompt, 5, VOCAB)
    assert result.tokens == {0: expected, 1: expected}
    assert result.starts[0].cached_tokens == 0
    # one that has begun a page by itself throws that away when the page of the other is ready
    assert result.starts[1].cached_tokens >= 15


@pytest.mark.parametrize("depth", [0, 1])
def test_a_warm_repeat_is_cached_to_the_last_full_page(depth: int) -> None:
    loop = hash_loop(num_pages=30, page_size=4, depth=depth)
    prompt = list(range(13))
    loop.channel.inbox.append(generate_msg(0, prompt, max_tokens=6))
    cold = drain(loop)
    loop.channel.inbox.append(generate_msg(1, prompt, max_tokens=6))
    warm = drain(loop)
    assert warm.tokens[1] == cold.tokens[0] == expected_output(prompt, 6, VOCAB)
    assert warm.starts[1].cached_tokens == 12
    longer = prompt + cold.tokens[0][:4]
    loop.channel.inbox.append(generate_msg(2, longer, max_tokens=1))
    assert drain(loop).starts[2].cached_tokens == 16


def test_without_the_radix_cache_nothing_is_cached_and_all_pages_return() -> None:
    loop = hash_loop(num_pages=30, page_size=4, radix_cache=False)
    for uid in (0, 1):
        loop.channel.inbox.append(generate_msg(uid, [1] * 12, max_tokens=4))
    result = drain(loop)
    assert result.tokens == {uid: expected_output([1] * 12, 4, VOCAB) for uid in (0, 1)}
    assert result.starts[1].cached_tokens == 0
    assert loop.scheduler.cache.pages.num_free == 30


@pytest.mark.parametrize("depth", [0, 1])
def test_a_pool_that_is_too_small_retracts_and_every_text_stays_right(depth: int) -> None:
    loop = hash_loop(num_pages=10, page_size=2, num_rows=4, depth=depth)
    prompts = {uid: [uid, 1, 2, 3] for uid in range(4)}
    for uid, prompt in prompts.items():
        loop.channel.inbox.append(generate_msg(uid, prompt, max_tokens=12))
    result = drain(loop)
    assert loop.scheduler.num_preemptions > 0
    assert result.tokens == {u: expected_output(p, 12, VOCAB) for u, p in prompts.items()}


def test_a_long_prompt_does_not_hold_up_those_who_decode() -> None:
    loop = hash_loop(num_pages=100, page_size=2, budget=4)
    loop.channel.inbox.append(generate_msg(0, [1, 2], max_tokens=40))
    result = Result()
    loop.turn()
    loop.channel.inbox.append(generate_msg(1, list(range(80)), max_tokens=1))
    for turn in range(2, 22):
        loop.turn()
        collect(loop, result)
        assert len(result.tokens[0]) == turn, "a turn without a token for the one who decodes"


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one() -> None:
    loop = hash_loop(num_pages=100, page_size=2, budget=8)
    loop.channel.inbox.append(generate_msg(0, list(range(100)), max_tokens=1))
    loop.channel.inbox.append(generate_msg(1, [5, 6], max_tokens=1))
    result = Result()
    loop.turn()
    collect(loop, result)
    assert result.ends == {1: Finish.LENGTH}


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("depth", [0, 1])
def test_an_abort_at_any_time_gives_one_end_and_all_pages_back(turns: int, depth: int) -> None:
    loop = hash_loop(num_pages=30, page_size=2, budget=3, depth=depth)
    loop.channel.inbox.append(generate_msg(0, list(range(9)), max_tokens=4))
    result = Result()
    for _ in range(turns):
        loop.turn()
        collect(loop, result)
    loop.channel.inbox.append(AbortMsg(uids=(0,)))
    end = drain(loop)
    assert [*result.ends.values(), *end.ends.values()] == [Finish.ABORT]
    loop.scheduler.cache.evict(1000)
    assert loop.scheduler.cache.pages.num_free == 30


def test_what_is_over_the_context_is_refused_with_the_numbers() -> None:
    loop = hash_loop(num_pages=10, page_size=2)
    loop.channel.inbox.append(generate_msg(0, [1] * 15, max_tokens=6))
    loop.channel.inbox.append(generate_msg(1, [1] * 20))
    loop.channel.inbox.append(generate_msg(2, [1] * 15, n=2))
    result = drain(loop)
    assert result.failures[0].startswith(
        "This model's maximum context length is 20 tokens. However, you requested 21 tokens "
        "(15 in the messages, 6 in the completion)."
    )
    assert set(result.failures) == {0, 1}
    assert [len(result.tokens[uid]) for uid in (2, 3)] == [5, 5]
    assert result.ends == {2: Finish.LENGTH, 3: Finish.LENGTH}


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_ends_at_eos_at_its_own_stop_token_or_at_max_tokens(depth: int) -> None:
    prompt = [4, 5, 6]
    full = expected_output(prompt, 8, VOCAB)
    eos, stop = full[3], full[1]
    assert eos not in full[:3]
    assert stop != full[0]
    loop = hash_loop(num_pages=60, eos_ids=[eos], depth=depth)
    for uid, sampling in enumerate([{}, {"stop_token_ids": (stop,)}, {"ignore_eos": True}]):
        loop.channel.inbox.append(generate_msg(uid, prompt, max_tokens=8, **sampling))
    result = drain(loop)
    assert result.tokens == {0: full[:4], 1: full[:2], 2: full}
    assert result.ends == {0: Finish.STOP, 1: Finish.STOP_TOKEN, 2: Finish.LENGTH}


def test_a_burst_that_shares_a_prefix_computes_it_once() -> None:
    loop = hash_loop(num_pages=400, page_size=4, num_rows=32, budget=64)
    stem = [3] * 200
    for uid in range(32):
        loop.channel.inbox.append(generate_msg(uid, [*stem, uid, uid], max_tokens=2))
    result = drain(loop)
    for uid in range(32):
        assert result.tokens[uid] == expected_output([*stem, uid, uid], 2, VOCAB)
    assert all(result.starts[uid].cached_tokens == 200 for uid in range(1, 32))


def test_the_prompt_that_is_shown_comes_only_with_the_start_of_the_first_choice() -> None:
    loop = hash_loop()
    message = generate_msg(0, [1, 2, 3], max_tokens=2, n=2)
    shown = ShownPrompt(ids=message.prompt_ids, text="one two three")
    loop.channel.inbox.append(replace(message, shown_prompt=shown))
    loop.channel.inbox.append(generate_msg(2, [1, 2, 3], max_tokens=2))
    starts = drain(loop).starts
    assert {uid: start.shown_prompt for uid, start in starts.items()} == {
        0: shown,
        1: None,
        2: None,
    }


@pytest.mark.parametrize("depth", [0, 1])
def test_pages_are_shared_within_a_salt_and_with_no_other(depth: int) -> None:
    loop = hash_loop(num_pages=60, page_size=4, num_rows=8, budget=64, depth=depth)
    prompt = [*range(1, 14)]
    salts = ["", "red", "blue"]
    for uid, salt in enumerate(salts):
        loop.channel.inbox.append(generate_msg(uid, prompt, salt, max_tokens=3))
    together = drain(loop)
    assert [together.starts[uid].cached_tokens for uid in range(3)] == [0, 0, 0]
    assert loop.scheduler.cache.tree.num_pages == 3 * 3
    for uid, salt in enumerate([*salts, "green"], 3):
        loop.channel.inbox.append(generate_msg(uid, prompt, salt, max_tokens=3))
    later = drain(loop)
    assert [later.starts[uid].cached_tokens for uid in range(3, 7)] == [12, 12, 12, 0]
    texts = [*together.tokens.values(), *later.tokens.values()]
    assert texts == [expected_output(prompt, 3, VOCAB)] * 7
    assert loop.scheduler.cache.tree.num_evictable == 4 * 3
    loop.scheduler.cache.evict(100)
    assert loop.scheduler.cache.tree.root.children == {}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_an_aborted_prompt_does_not_return_half_of_its_log_probabilities(
    turns: int, depth: int
) -> None:
    loop = hash_loop(num_pages=30, budget=8, depth=depth)
    fields = {"echo": True, "logprobs": 1, "prompt_logprobs": 1}
    loop.channel.inbox.append(generate_msg(0, list(range(40)), max_tokens=2, **fields))
    for _ in range(turns):
        loop.turn()
    loop.channel.inbox.append(AbortMsg(uids=(0,)))
    result = drain(loop)
    assert result.ends == {0: Finish.ABORT}
    assert result.starts[0].prompt_logprobs is None
    assert result.starts[0].prompt_ids is None


def test_a_vocabulary_of_fewer_tokens_than_are_asked_for_is_returned_whole() -> None:
    loop = hash_loop(num_pages=30, budget=8, vocab_size=5)
    fields = {"logprobs": 20, "prompt_logprobs": 20}
    loop.channel.inbox.append(generate_msg(0, [1, 2, 3] * 7, max_tokens=2, **fields))
    told = drain(loop).starts[0].prompt_logprobs
    assert told is not None
    assert told.top_ids.tolist() == [0, 1, 2, 3, 4] * 20
